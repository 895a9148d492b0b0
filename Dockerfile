# Touchline in a container. Documented and checked by tests/test_dockerfile.py, built by no CI of this project.
#
#   docker build -t touchline .                        # the pipeline
#   docker build -t touchline-serve --target serve .   # answers over HTTP
#
# docs/housekeeping.md says how to run both. No secret belongs into an image: give credentials at `docker run`.

# A tag may come to mean another image: give the digest of the one you mean (docs/housekeeping.md says how).
ARG BASE=python:3.11-slim
FROM ${BASE} AS installed

# git: DVC asks it about commits; make: one way to install and run, here as elsewhere.
RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 touchline && install --directory --owner touchline /touchline
USER touchline
WORKDIR /touchline
ENV PATH=/touchline/.venv/bin:$PATH PYTHONUNBUFFERED=1

# The packages alone, as the Makefile installs them, so that a change of the code does not fetch them again.
COPY --chown=touchline requirements.lock ./
RUN python -m venv .venv && sed -n '/^uv==/,/[^\\]$/p' requirements.lock > .venv/uv.lock \
    && python -m pip install --quiet --no-cache-dir --disable-pip-version-check --require-hashes -r .venv/uv.lock \
    && uv pip sync --quiet --no-cache --compile-bytecode --require-hashes requirements.lock

COPY --chown=touchline Makefile pyproject.toml README.md LICENSE THIRD_PARTY_NOTICES.md dvc.yaml params.yaml prefect.yaml .dvcignore ./
COPY --chown=touchline .dvc ./.dvc
COPY --chown=touchline data ./data
COPY --chown=touchline mlflow ./mlflow
COPY --chown=touchline flows ./flows
COPY --chown=touchline src ./src
# Volumes begin as what is here, so these folders must be the user's before they are one.
RUN make setup && mkdir -p models reports .dvc/cache

# With DVC's cache kept, a new container takes from it what an old one has computed.
VOLUME ["/touchline/data", "/touchline/mlflow", "/touchline/models", "/touchline/reports", "/touchline/.dvc/cache"]


FROM installed AS serve
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=90s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ping', timeout=4)"]
CMD ["touchline", "serve", "--host", "0.0.0.0", "--port", "8000"]


FROM installed AS run
CMD ["make", "run"]
