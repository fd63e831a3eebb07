"""The grammar of architecture names: what a file may say, what only a user may say, and what nobody may say."""

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
from hypothesis import given
from hypothesis import strategies as st

from lustral.vision.models import (
    CodeRefusedError,
    ModelFileError,
    build_classifier,
    load_model,
    parse_architecture,
    save_model,
)
from lustral.vision.models.architecture import (
    Architecture,
    ArchitectureError,
    ConditionedOn,
    PythonFile,
    Registered,
    Timm,
    Torchvision,
    code_in,
    runs_user_code,
)

SHAPE = (3, 8, 8)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("small_cnn", Registered("small_cnn")),
        ("preact_resnet18:width=16,final_norm=0", Registered("preact_resnet18", (("width", 16), ("final_norm", 0)))),
        ("torchvision:vit_b_16", Torchvision("vit_b_16")),
        ("timm:resnet50.a1_in1k", Timm("resnet50.a1_in1k")),
        ("conditioned:layer4.1.conv1@timm:resnet18", ConditionedOn("layer4.1.conv1", Timm("resnet18"))),
        ("conditioned:größe.conv-1@small_cnn", ConditionedOn("größe.conv-1", Registered("small_cnn"))),
        ("conditioned:a@conditioned:b@vgg11_bn", ConditionedOn("a", ConditionedOn("b", Registered("vgg11_bn")))),
        ("my nets/Jörg@home/net.py:build", PythonFile("my nets/Jörg@home/net.py", "build")),
        ("conditioned:fc@C:\\nets\\net.py:Net", ConditionedOn("fc", PythonFile("C:\\nets\\net.py", "Net"))),
    ],
)
def test_a_name_is_parsed_once_and_written_back(text: str, value: Architecture) -> None:
    assert parse_architecture(text, allow_code=True) == value
    assert str(value) == text
    assert runs_user_code(value) == runs_user_code(text) == (".py:" in text)


CODE = [
    "net.py:f",
    "/tmp/evil.py:f",
    "conditioned:x@evil.py:f",
    "conditioned:x@conditioned:y@path/evil.py:f",
    "timm:evil.py:f",
    "torchvision:evil.py:f",
    "small_cnn:width=evil.py:f",
]
HOSTILE = [
    "conditioned:x\ny@path/evil.py:f",
    "conditioned:x@evil\n.py:f",
    "conditioned:x@conditioned:y\r@evil.py:f",
    "\nevil.py:f",
    "evil.py:f\n",
    "evil.py:f\u2028",
    "evil.py:\u202ef",
    "e\u200bvil.py:f",
    "e\x00vil.py:f",
    "e\u3164vil.py:f",  # a letter that nobody sees
    "conditioned:a\u3164@small_cnn",
    "my\u2003nets/evil.py:f",
    "evil.py:f g",
    "evil.py:f()",
    "small_cnn\n",
    " small_cnn",
    "small_cnn:width=4\n",
    "small_cnn:width= 4",
    "small_cnn:width=\u0664",  # a digit of another script
    "small_cnn:width=+4",
    "small_cnn:width=1_0",
    "small_cnn:width=99999999999",
    "small_cnn:width=4,width=1024",
    "small_cnn:",
    "sm\u0430ll_cnn",  # a Cyrillic letter
    "torchvision:../resnet18",
    "torchvision:",
    "timm:hf-hub:someone/net",
    "timm:hf_hub:someone/net",
    "timm:local-dir:/tmp/net",
    "timm:resnet18.local-dir:/tmp",
    "timm:/etc/passwd",
    "conditioned:@small_cnn",
    "conditioned:a..b@small_cnn",
    "conditioned:a b@small_cnn",
    "conditioned:a",
    "conditioned:" * 5,
    "",
    "x" * 1001,
]


@pytest.mark.parametrize("text", CODE + HOSTILE)
def test_no_file_may_say_this(text: str) -> None:
    with pytest.raises(ArchitectureError) as caught:
        parse_architecture(text, allow_code=False)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_nobody_may_say_this(text: str) -> None:
    with pytest.raises(ArchitectureError):
        parse_architecture(text, allow_code=True)
    assert not runs_user_code(text)


@pytest.mark.parametrize("text", CODE[:4])
def test_code_is_for_those_who_may_run_it(text: str) -> None:
    with pytest.raises(CodeRefusedError, match="is Python code"):
        parse_architecture(text, allow_code=False)
    assert runs_user_code(parse_architecture(text, allow_code=True))


@given(st.text(alphabet=st.sampled_from("conditioned:@.py\n\r \u2028\u202eaf_=,0/\\\x00"), max_size=40))
def test_whatever_a_file_says_is_no_code(text: str) -> None:
    try:
        parsed = parse_architecture(text, allow_code=False)
    except ArchitectureError:
        return
    assert not runs_user_code(parsed)
    assert parse_architecture(str(parsed), allow_code=False) == parsed


def test_code_is_found_anywhere_in_a_specification() -> None:
    spec = {"arch": "small_cnn", "attack": {"settings": {"surrogate": {"arch": "conditioned:a@evil.py:f"}}}, "seed": 1}
    assert list(code_in(spec)) == ["conditioned:a@evil.py:f"]
    assert list(code_in([["small_cnn", ("net.py:f",)], 2.5, None])) == ["net.py:f"]
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    assert list(code_in(deep)) == []


@pytest.mark.parametrize("text", CODE + HOSTILE)
def test_a_model_file_that_records_it_is_refused_and_nothing_runs(tmp_path: Path, text: str) -> None:
    """The recorded name is written past ``save_model``, which would refuse the malformed ones."""
    if "\x00" in text:
        pytest.skip("safetensors' own writer takes no such text")
    mark = tmp_path / "ran"
    for name in ("evil.py", "net.py", "path/evil.py", "y@path/evil.py"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"open({str(mark)!r}, 'w').close()\n")
    text = text.replace("path/", f"{tmp_path}/path/").replace("@evil", f"@{tmp_path}/evil")
    path = tmp_path / "model.safetensors"
    model = build_classifier("small_cnn:width=2", num_classes=3, image_shape=SHAPE)
    save_model(path, model, arch="small_cnn:width=2", image_shape=SHAPE)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    safetensors.torch.save_file(model.network.state_dict(), path, {**metadata, "arch": text})
    with pytest.raises(ModelFileError, match=r"is not run because a file names it|damaged metadata"):
        load_model(path)
    assert not mark.exists()


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_is_written_that_could_not_be_read(tmp_path: Path, text: str) -> None:
    model = build_classifier("small_cnn:width=2", num_classes=3, image_shape=SHAPE)
    with pytest.raises(ArchitectureError):
        save_model(tmp_path / "model.safetensors", model, arch=text, image_shape=SHAPE)
    assert not list(tmp_path.iterdir())
