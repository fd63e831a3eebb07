"""Max-entropy trigger generation: a staircase of generators, each spread over all triggers that fire well enough.

MESA: Qiao, Yang, Li, "Defending Neural Backdoors via Generative Distribution Modeling", NeurIPS 2019 (arXiv 1910.04749);
the same stage 1 serves BaEraser: Liu et al., "Backdoor Defense with Machine Unlearning", INFOCOM 2022 (arXiv 2201.09538).
Sub-model i, with statistics network T, maximises

    mean min(softmax(f(x + trigger))[c], beta_i)  +  alpha * I_T(z; G_i(z)),

the hinge asking for triggers that fire at level beta_i and no more, the mutual information for as many as possible.

The published operator pastes a 3x3 patch at random places, and is blind to a trigger that fires at one place only. Here the
generator emits *what* (a mask and a pattern, started from the smallest mask that a search finds, with a penalty on area)
and *where*: shifts are few enough to try all of them, so the max-entropy distribution over places, uniform on those that
fire at level beta_i, is computed instead of learnt. ``operator="random_patch"`` keeps the published form.

With the learned operator the mutual information does nothing that can be measured. Its samples differ by 0.001 in a pixel on
average, the statistics network cannot tell them apart in so few steps, and its estimate stays at 0. Their spread comes from the
noise of a generator that has hardly been trained, and from the hinge. Numbers: docs/methods/max_entropy.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import fork, on_device
from lustral.core.records import OnProgress, Progress
from lustral.training import Precision, autocast, frozen
from lustral.vision.images import at_most, check_holdout, split
from lustral.vision.inverters.mask_search import FoundMasks, MaskSearch
from lustral.vision.inverters.sampling import SampleImages
from lustral.vision.records import DefenderView, ImageSet, RecoveredTrigger, TriggerKind

NOISE_DIM = 64  # uniform [0, 1], cut into one slice per layer
NUM_LAYERS = 4
EMA_RATE = 0.001  # of the bias-corrected MINE gradient
SPREAD_SAMPLES = 128  # compared in pairs
MAX_LOGIT = 6.0  # bound on warm-start logits, so that sigmoids keep a gradient


class GroupedLinear(nn.Module):
    """Several independent linear layers in one batched product: (G, B, in) to (G, B, out)."""

    def __init__(self, groups: int, num_in: int, num_out: int, *, bias: bool = True) -> None:
        """Initialise every group as ``nn.Linear`` does."""
        super().__init__()
        bound = num_in**-0.5
        self.weight = nn.Parameter(torch.empty(groups, num_in, num_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(groups, 1, num_out).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply each group's layer to its own rows."""
        return x @ self.weight if self.bias is None else torch.baddbmm(self.bias, x, self.weight)


class TriggerGenerator(nn.Module):
    """Maps noise to trigger logits, one generator per group; noise slices enter at every layer (MESA's code)."""

    def __init__(self, groups: int, hidden: int, num_out: int) -> None:
        """Build ``groups`` generators of four linear layers with batch normalisation and LeakyReLU(0.2)."""
        super().__init__()
        piece = NOISE_DIM // NUM_LAYERS
        sizes = [(piece, hidden), (hidden + piece, hidden), (hidden + piece, hidden), (hidden + piece, num_out)]
        self.layers = nn.ModuleList(GroupedLinear(groups, a, b) for a, b in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm1d(groups * hidden) for _ in sizes[1:])

    def forward(self, z: Tensor) -> Tensor:
        """Map z (G, B, 64) to logits (G, B, num_out)."""
        groups, batch, _ = z.shape
        first, *others = z.chunk(NUM_LAYERS, dim=2)
        x: Tensor = self.layers[0](first)
        for norm, layer, piece in zip(self.norms, self.layers[1:], others, strict=True):
            flat = norm(x.transpose(0, 1).reshape(batch, -1))
            x = F.leaky_relu(flat.view(batch, groups, -1).transpose(0, 1), 0.2)
            x = layer(torch.cat([x, piece], dim=2))
        return x


class StatisticsNetwork(nn.Module):
    """T(z, x) of the mutual-information estimate; no activation on the output (MESA's code has one, an oddity)."""

    def __init__(self, groups: int, hidden: int, num_out: int) -> None:
        """Build one network per group."""
        super().__init__()
        self.from_noise = GroupedLinear(groups, NOISE_DIM, hidden)
        self.from_trigger = GroupedLinear(groups, num_out, hidden, bias=False)
        self.middle = GroupedLinear(groups, hidden, hidden)
        self.last = GroupedLinear(groups, hidden, 1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Map z (G, B, 64) and triggers (G, B, D) to (G, B)."""
        hidden = F.leaky_relu(self.from_noise(z) + self.from_trigger(x), 0.2)
        out: Tensor = self.last(F.leaky_relu(self.middle(hidden), 0.2))
        return out.squeeze(2)


def mutual_information(joint: Tensor, marginal: Tensor) -> Tensor:
    """Return the Donsker-Varadhan bound mean T(z, x) - log mean exp T(z', x), over the last dimension.

    >>> mutual_information(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0])).item()
    1.0
    """
    count = torch.tensor(float(marginal.shape[-1]))
    return joint.mean(-1) - (marginal.logsumexp(-1) - count.log())


def hinge(probability: Tensor, level: Tensor) -> Tensor:
    """Return how far each target probability (G, B) falls short of its group's level (G,), per sample."""
    return (level[:, None] - probability).clamp_min(0)


def shifted(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Move each image (B, C, H, W) down and right by whole pixels (B,), filling with zeros."""
    batch, _, height, width = x.shape
    y = torch.arange(height, device=x.device) - rows[:, None]
    u = torch.arange(width, device=x.device) - columns[:, None]
    inside = ((y >= 0) & (y < height))[:, None, :, None] & ((u >= 0) & (u < width))[:, None, None, :]
    which = torch.arange(batch, device=x.device)[:, None, None]
    moved = x.permute(0, 2, 3, 1)[which, y.clamp(0, height - 1)[:, :, None], u.clamp(0, width - 1)[:, None, :]]
    return moved.permute(0, 3, 1, 2) * inside


def sample_spread(masks: Tensor, patterns: Tensor) -> float:
    """Return the mean pairwise distance of stamped samples: the root of the summed squared differences, in pixels.

    At most ``SPREAD_SAMPLES`` of them are compared, from all over: samples come level after level.
    """
    flat = torch.cat([masks, masks * patterns], 1).flatten(1)
    if len(flat) < 2:
        return 0.0
    places = torch.linspace(0, len(flat) - 1, min(len(flat), SPREAD_SAMPLES), device=flat.device)
    flat = flat[places.round().long()]
    return float(torch.pdist(flat).mean()) / math.sqrt(patterns.shape[1])


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one step down a scalar loss; gradients from before do not count."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


@dataclass(frozen=True, kw_only=True)
class MaxEntropy:
    """Recover the distribution of triggers that lead to a label.

    Attributes:
        levels: success levels beta of the staircase; 0.5, 0.8 and 0.9 in MESA, 0.5 alone in BaEraser's code.
        entropy_weight: alpha; 0.1 in both papers. Spreads the published patches; without effect on what the learned
            operator returns, see above.
        hidden: width of generators and statistics networks; 512 in MESA, 2048 in BaEraser's code.
        steps: generator steps; 620 in MESA, 200 in BaEraser's code.
        batch_size: samples per sub-model and step; 128 in both.
        learning_rate: of Adam (betas 0.5, 0.999) for both networks; 2e-4 in both, for a patch of 27 numbers.
        trigger_noise: standard deviation of the noise added to patterns before pasting; 0.1 in both.
        operator: "learned" emits mask, pattern and place; "random_patch" is the published fixed-size patch pasted at a
            random place.
        patch_size: side of the published operator's patch; 3 in both papers.
        area_slack: mean mask area that costs nothing, as a multiple of the smallest mask found.
        area_weight: penalty per multiple of area beyond that.
        samples: samples kept of each distribution.
        holdout: share of the clean images that ``invert`` keeps to measure success on, where it is given none for that.
        search: the warm start.
        precision: "auto" takes bfloat16 where the hardware has it.
    """

    version: ClassVar[int] = 2

    levels: tuple[float, ...] = (0.5, 0.8, 0.9)
    entropy_weight: float = 0.1
    hidden: int = 256
    steps: int = 120
    batch_size: int = 32
    learning_rate: float = 1e-3
    trigger_noise: float = 0.1
    operator: Literal["learned", "random_patch"] = "learned"
    patch_size: int = 3
    area_slack: float = 1.5
    area_weight: float = 0.5
    samples: int = 384
    holdout: float = 0.2
    search: MaskSearch = field(default_factory=MaskSearch)
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.levels or not all(0 < level <= 1 for level in self.levels):
            raise ValueError(f"expected success levels in (0, 1]; got {self.levels}")
        if self.steps < 1 or self.batch_size < 2 or self.samples < len(self.levels) or self.hidden < 1:
            raise ValueError(f"expected steps >= 1, batch_size >= 2 and samples >= levels; got {self}")
        check_holdout(self.holdout)

    @property
    def kind(self) -> TriggerKind:
        """The kind of what it recovers, by what its search makes small."""
        return "faint" if self.search.penalty == "energy" else "patch"

    def invert(
        self,
        view: DefenderView,
        target_labels: Sequence[int],
        *,
        generator: Generator,
        held_out: ImageSet | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[RecoveredTrigger]:
        """Return one recovered distribution per target label; see ``Inverter``."""
        images, start = view.clean, None
        if held_out is None:
            held_out, images = split(view.clean, self.holdout, generator=fork(generator, "holdout"))
        if self.operator == "learned":
            start = self.search.run(
                view.model, images, target_labels, generator=fork(generator, "search"), on_progress=on_progress
            )
        return self.fit_generators(
            view.model,
            images,
            target_labels,
            start,
            held_out=held_out,
            generator=fork(generator, "spread"),
            on_progress=on_progress,
        )

    def fit_generators(
        self,
        model: nn.Module,
        images: ImageSet,
        target_labels: Sequence[int],
        start: FoundMasks | None,
        *,
        held_out: ImageSet,
        generator: Generator,
        on_progress: OnProgress | None = None,
    ) -> list[RecoveredTrigger]:
        """Fit the staircase around the masks a search has found, all labels and levels in one batch.

        Args:
            model: classifier, unchanged afterwards.
            images: clean images on the model's device.
            target_labels: K labels.
            start: the search's result for exactly these labels; None with the published operator.
            held_out: clean images apart from ``images``, to measure the success of the samples on.
            generator: CPU stream.
            on_progress: called after each step.
        """
        if not target_labels:
            return []
        device = images.device
        levels = torch.tensor(self.levels, device=device).repeat(len(target_labels))  # (G,), G = K * levels
        targets = torch.tensor(target_labels, device=device).repeat_interleave(len(self.levels))
        groups = len(targets)
        base = self._base_logits(start, images)  # (G, D)
        places = self._places(model, images, targets, levels, base, fork(generator, "places"))
        maker, judge = self._networks(groups, base.shape[1], images, generator)
        area0 = self._triggers(base[:, None], images)[0].flatten(1).sum(1)  # (G,)
        make_step = torch.optim.Adam(maker.parameters(), self.learning_rate, betas=(0.5, 0.999))
        judge_step = torch.optim.Adam(judge.parameters(), self.learning_rate, betas=(0.5, 0.999))
        feed = SampleImages(images, targets, generator=fork(generator, "images"))
        stream = on_device(fork(generator, "noise"), device)
        rows = torch.arange(groups, device=device)
        average: Tensor | None = None

        def noise() -> Tensor:
            return torch.rand(groups, self.batch_size, NOISE_DIM, generator=stream, device=device)

        with frozen(model):
            for step in range(1, self.steps + 1):
                z = noise()
                mask, pattern = self._triggers(base[:, None] + maker(z), images)
                x = feed.draw(rows, self.batch_size)
                stamped = self._stamp(x, mask, pattern, places, stream)
                with autocast(device, self.precision):
                    logits = model(stamped.contiguous(memory_format=torch.channels_last)).float()
                goal = targets.repeat_interleave(self.batch_size)[:, None]
                fires = logits.softmax(1).gather(1, goal).view(groups, -1)
                triggers = self._visible(mask, pattern).view(groups, self.batch_size, -1)
                information = mutual_information(judge(z, triggers), judge(noise(), triggers))
                area = mask.flatten(1).sum(1).view(groups, -1).mean(1)
                excess = (area / (self.area_slack * area0) - 1).clamp_min(0)
                loss = hinge(fires, levels).mean(1) - self.entropy_weight * information.clamp_max(5)
                _descend(make_step, (loss + self.area_weight * excess).sum())
                with torch.no_grad():
                    z = noise()
                    triggers = self._visible(*self._triggers(base[:, None] + maker(z), images))
                    triggers = triggers.view(groups, self.batch_size, -1)
                joint, marginal = judge(z, triggers), judge(noise(), triggers)
                level = marginal.exp().mean(1)
                average = level.detach() if average is None else average.lerp(level.detach(), EMA_RATE)
                _descend(judge_step, (level / average - joint.mean(1)).sum())  # the bias-corrected gradient of -I
                if on_progress is not None:
                    on_progress(Progress(stage="spreading triggers", done=step, total=self.steps))
            return self._collect(model, held_out, target_labels, targets, maker, base, places, start, stream)

    def _networks(
        self, groups: int, outputs: int, images: ImageSet, generator: Generator
    ) -> tuple[TriggerGenerator, StatisticsNetwork]:
        """Return a new generator and statistics network of every group, on the images' device."""
        device = images.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            maker = TriggerGenerator(groups, self.hidden, outputs).to(device)
            judge = StatisticsNetwork(groups, self.hidden, self._seen_size(images)).to(device)
        return maker, judge

    def _seen_size(self, images: ImageSet) -> int:
        channels, height, width = images.image_shape
        if self.operator == "random_patch":
            return (channels + 1) * self.patch_size**2
        return (channels + 1) * height * width

    def _base_logits(self, start: FoundMasks | None, images: ImageSet) -> Tensor:
        """Return the logits the generators start from: the found masks, or nothing for the published patch."""
        channels = images.image_shape[0]
        if self.operator == "random_patch":
            return images.images.new_zeros((1, channels * self.patch_size**2), dtype=torch.float32)
        if start is None:
            raise ValueError("the learned operator starts from found masks; run its search first, or call invert")
        both = torch.cat([start.masks, start.patterns], 1).logit(eps=1e-6).clamp(-MAX_LOGIT, MAX_LOGIT)
        return both.flatten(1).repeat_interleave(len(self.levels), 0)

    def _triggers(self, logits: Tensor, images: ImageSet) -> tuple[Tensor, Tensor]:
        """Turn logits (G, B, D) into masks (G * B, 1, h, w) and patterns (G * B, C, h, w)."""
        channels, height, width = images.image_shape
        flat = logits.flatten(0, 1).sigmoid()
        if self.operator == "random_patch":
            size = self.patch_size
            pattern = flat.view(-1, channels, size, size)
            return torch.ones_like(pattern[:, :1]), pattern
        both = flat.view(-1, channels + 1, height, width)
        return both[:, :1], both[:, 1:]

    @staticmethod
    def _visible(mask: Tensor, pattern: Tensor) -> Tensor:
        """Return what the statistics network sees: only what shows, so that hidden pixels earn no entropy."""
        return torch.cat([mask, mask * (pattern - 0.5)], 1).flatten(1)

    def _places(
        self, model: nn.Module, images: ImageSet, targets: Tensor, levels: Tensor, base: Tensor, generator: Generator
    ) -> list[Tensor]:
        """Return, per group, the shifts (M, 2) at which its base trigger fires at the group's level."""
        _, height, width = images.image_shape
        if self.operator == "random_patch":
            size = self.patch_size
            grid = torch.cartesian_prod(torch.arange(height - size + 1), torch.arange(width - size + 1))
            return [grid.to(images.device)] * len(targets)
        masks, patterns = self._triggers(base[:, None], images)
        found: list[Tensor] = []
        per_label = len(self.levels)
        stream = fork(generator, "images")
        for index in range(0, len(targets), per_label):
            mask, pattern = masks[index : index + 1], patterns[index : index + 1]
            shifts, rates = measure_places(
                model, images, int(targets[index]), mask, pattern, generator=stream, precision=self.precision
            )
            for level in levels[index : index + per_label].tolist():
                found.append(shifts[rates >= min(level, float(rates[0]))])
        return found

    def _stamp(self, x: Tensor, mask: Tensor, pattern: Tensor, places: list[Tensor], stream: Generator) -> Tensor:
        """Paste samples on images x (G, B, C, H, W), each at a place drawn from its group's distribution."""
        _, batch, _, height, width = x.shape
        if self.trigger_noise:
            noise = torch.randn(pattern.shape, generator=stream, device=stream.device)
            pattern = (pattern + self.trigger_noise * noise).clamp(0, 1)
        mask, pattern = self._place(mask, pattern, places, batch, (height, width), stream)
        images = x.flatten(0, 1)
        return images + mask * (pattern - images)

    def _place(
        self,
        mask: Tensor,
        pattern: Tensor,
        places: list[Tensor],
        batch: int,
        size: tuple[int, int],
        stream: Generator,
    ) -> tuple[Tensor, Tensor]:
        """Move each sample to a place drawn uniformly from its group's list."""
        drawn = [p[torch.randint(len(p), (batch,), generator=stream, device=stream.device)] for p in places]
        rows, columns = torch.cat(drawn).unbind(1)
        both = torch.cat([mask, mask * pattern], 1)  # premultiplied: moved edges stay clean
        padding = (0, size[1] - both.shape[3], 0, size[0] - both.shape[2])
        moved = shifted(F.pad(both, padding), rows, columns)
        return moved[:, :1], moved[:, 1:] / moved[:, :1].clamp_min(1e-6)

    @torch.no_grad()
    def _collect(
        self,
        model: nn.Module,
        held_out: ImageSet,
        target_labels: Sequence[int],
        targets: Tensor,
        maker: TriggerGenerator,
        base: Tensor,
        places: list[Tensor],
        start: FoundMasks | None,
        stream: Generator,
    ) -> list[RecoveredTrigger]:
        """Sample every sub-model, equally often, and measure the samples on held-out images."""
        maker.eval()
        groups, per_group = len(targets), self.samples // len(self.levels)
        z = torch.rand(groups, per_group, NOISE_DIM, generator=stream, device=base.device)
        mask, pattern = self._triggers(base[:, None] + maker(z), held_out)
        _, height, width = held_out.image_shape
        mask, pattern = self._place(mask, pattern, places, per_group, (height, width), stream)
        results = []
        for index, label in enumerate(target_labels):
            own = slice(index * len(self.levels) * per_group, (index + 1) * len(self.levels) * per_group)
            trigger = RecoveredTrigger(
                target_label=label,
                masks=mask[own],
                patterns=pattern[own].clamp(0, 1),
                area=float(mask[own].sum() / len(mask[own])) if start is None else float(start.areas[index]),
                attack_success_rate=0.0,
                entropy=sample_spread(mask[own], pattern[own]),
                kind=self.kind,
            )
            rate = firing_rate(model, held_out, trigger, precision=self.precision)
            results.append(replace(trigger, attack_success_rate=rate))
        return results


@torch.no_grad()
def measure_places(
    model: nn.Module,
    images: ImageSet,
    label: int,
    mask: Tensor,
    pattern: Tensor,
    *,
    generator: Generator,
    images_per_place: int = 16,
    most_places: int = 256,
    precision: Precision = "auto",
) -> tuple[Tensor, Tensor]:
    """Try one trigger at a grid of shifts that keeps the centre of its mask inside the image.

    Returns:
        (shifts, rates): (M, 2) int64 rows and columns, the first (0, 0); (M,) success rates.
    """
    _, height, width = images.image_shape
    weight = mask[0, 0] / mask.sum().clamp_min(1e-6)
    centre_row = round(float((weight.sum(1) * torch.arange(height, device=mask.device)).sum()))
    centre_column = round(float((weight.sum(0) * torch.arange(width, device=mask.device)).sum()))
    stride = max(1, round((height * width / most_places) ** 0.5))
    grid = torch.cartesian_prod(torch.arange(0, height, stride), torch.arange(0, width, stride))
    near = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2))
    near = near[near.abs().sum(1).argsort(stable=True)]  # (0, 0) first, then its neighbours
    shifts = torch.cat([near, grid - torch.tensor([centre_row, centre_column])]).to(mask.device)
    pool = images.subset((images.labels != label).nonzero().flatten())
    pick = torch.randint(len(pool), (images_per_place,), generator=generator)
    x = next(pool.subset(pick).batches(images_per_place)).inputs
    rates = []
    for chunk in torch.split(shifts, max(1, 512 // images_per_place)):
        both = torch.cat([mask, mask * pattern], 1).expand(len(chunk), -1, -1, -1)
        moved = shifted(both, chunk[:, 0], chunk[:, 1])[:, None]
        stamped = x * (1 - moved[:, :, :1]) + moved[:, :, 1:]
        with frozen(model), autocast(images.device, precision):
            out = model(stamped.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        rates.append((out.argmax(1) == label).view(len(chunk), -1).float().mean(1))
    return shifts, torch.cat(rates)


@torch.no_grad()
def firing_rate(
    model: nn.Module, images: ImageSet, trigger: RecoveredTrigger, *, most: int = 512, precision: Precision = "auto"
) -> float:
    """Return the fraction of images that samples of a trigger send to its label, of those that are not called it anyway.

    At most ``most`` images of other classes are looked at; 0 where the model calls all of them the label without a trigger.
    """
    pool = at_most(images.subset(images.labels != trigger.target_label), most)
    hits, away = torch.zeros((2,), dtype=torch.int64, device=images.device)
    with frozen(model):
        for start, (x, *_) in enumerate(pool.batches(256)):
            stream = torch.Generator().manual_seed(start)
            with autocast(images.device, precision):
                plain = model(x.contiguous(memory_format=torch.channels_last)).argmax(1) != trigger.target_label
                out = model(trigger(x, generator=stream).contiguous(memory_format=torch.channels_last))
            away += plain.sum()
            hits += (plain & (out.argmax(1) == trigger.target_label)).sum()
    return int(hits) / max(int(away), 1)
