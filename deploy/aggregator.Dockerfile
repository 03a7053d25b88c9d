# The aggregator, without torch and scikit-learn. From the repository's root:
#   docker build -f deploy/aggregator.Dockerfile -t fluffle-aggregator:0.1.0 .
# It needs a run whose first model is a file (`initial` in [run]) and whose evaluation mode is not `central`.
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    MPLCONFIGDIR=/tmp/matplotlib

# A volume that is first mounted here takes over who owns the directory.
RUN groupadd --gid 10001 fluffle \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin fluffle \
    && install -d -o fluffle -g fluffle /var/lib/fluffle/run /var/lib/fluffle/model

WORKDIR /opt/fluffle
COPY constraints.txt deploy/aggregator-requirements.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt --requirement aggregator-requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps .

USER 10001:10001
WORKDIR /var/lib/fluffle/run
EXPOSE 8750
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8750/healthz', timeout=4)"]
ENTRYPOINT ["fluffle"]
CMD ["aggregator", "/etc/fluffle/run.toml"]
