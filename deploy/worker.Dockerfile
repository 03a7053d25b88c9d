# A participant's worker, with torch for the CPU. From the repository's root:
#   docker build -f deploy/worker.Dockerfile -t fluffle-worker:0.1.0 .
# Another build of torch, or a mirror of your own:
#   docker build -f deploy/worker.Dockerfile --build-arg TORCH_INDEX_URL=https://... -t fluffle-worker:0.1.0 .
FROM python:3.11-slim

ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    MPLCONFIGDIR=/tmp/matplotlib

# A volume that is first mounted here takes over who owns the directory.
RUN groupadd --gid 10001 fluffle \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin fluffle \
    && install -d -o fluffle -g fluffle /var/lib/fluffle/journal /var/lib/fluffle/model

WORKDIR /opt/fluffle
COPY constraints.txt ./
# torch first and from its own index: PyPI's build brings gigabytes of GPU libraries.
RUN grep '^torch==' constraints.txt > torch.txt \
    && pip install --no-cache-dir --index-url "$TORCH_INDEX_URL" --requirement torch.txt
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt .

USER 10001:10001
WORKDIR /var/lib/fluffle/journal
STOPSIGNAL SIGTERM
# A worker that cannot go on exits. What else there is to ask it takes site.http: see deploy/compose.yaml.
HEALTHCHECK NONE
ENTRYPOINT ["fluffle"]
CMD ["worker", "--help"]
