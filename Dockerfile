# docker build -t lustral .   then   docker run --rm -v "$PWD:/work" lustral theirs.pth --arch resnet18 --data images --out scan-out
FROM python:3.12-slim

RUN useradd --create-home scanner
COPY pyproject.toml README.md LICENSE /src/
COPY src /src/src
# processors only: an image with CUDA is ten times as large
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu /src && rm -r /src

USER scanner
WORKDIR /work
ENTRYPOINT ["lustral", "scan"]
CMD ["--help"]
