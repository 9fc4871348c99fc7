# Two images: `actor` (also parameter server, relay and evaluator) and `learner`. `make image` builds both.
#
#   TORCH_INDEX_URL          where a CPU build of torch comes from, which the package index does not have for
#                            Linux: --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
#                            Empty: pip's own settings, if they name such a place. Hundreds of nodes should
#                            not pull gigabytes of CUDA, so a CUDA build of torch in `actor` is an error.
#   LEARNER_TORCH_INDEX_URL  the same for `learner`, usually of a CUDA build: .../whl/cu130. Empty: the CPU's.
#   EXTRAS                   extras of pyproject.toml, such as vizdoom, separated by commas
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# What pods run in: nothing to write to but /tmp, no bytecode to write, log lines at once.
FROM ${PYTHON_IMAGE} AS runtime
ENV PATH=/opt/impala/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /tmp

# The dependencies, at the versions of the lock file. They seldom change: layers of their own.
FROM runtime AS packages
ENV PIP_PYTHON=/opt/impala/bin/python PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
# What only a compiler and torch's own tests need is 200 MB, to be removed in the step that brings it.
ENV TRIM_TORCH="cd /opt/impala/lib/python3.*/site-packages/torch && rm -rf include test && find bin -type f ! -name torch_shm_manager -delete"
WORKDIR /src
COPY constraints.txt ./
ARG TORCH_INDEX_URL=
# pip is asked first, because a CUDA build would be gigabytes to download before anybody sees the mistake.
RUN python3 -m venv --without-pip /opt/impala \
 && torch="-c constraints.txt ${TORCH_INDEX_URL:+--extra-index-url $TORCH_INDEX_URL} torch" \
 && pip install --dry-run $torch > plan.txt \
 && if grep -q nvidia plan.txt; then \
      echo "pip would install a CUDA build of torch, and actors run on CPUs; allowed is --build-arg TORCH_INDEX_URL=<of CPU builds>" >&2; \
      exit 1; \
    fi \
 && pip install $torch && eval "$TRIM_TORCH"
COPY pyproject.toml ./
ARG EXTRAS=
RUN python -c 'import sys, tomllib; \
project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = [name for name in sys.argv[1].split(",") if name]; \
print(*project["dependencies"], *(each for name in extras for each in project["optional-dependencies"][name]), sep="\n")' \
      "$EXTRAS" > requirements.txt \
 && pip install -c constraints.txt -r requirements.txt

# Our own code, which changes often, beside them.
FROM packages AS project
COPY README.md LICENSE ./
COPY services services
RUN pip install --no-deps --prefix /opt/project .

FROM runtime AS actor
COPY --from=packages /opt/impala /opt/impala
COPY --from=project /opt/project /opt/impala
RUN impala --version && python -c 'import torch; assert torch.version.cuda is None, torch.__version__'
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="impala-actor" \
      org.opencontainers.image.description="IMPALA for Kubernetes: actor, parameter server, relay and evaluator" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
USER 10001:10001
ENTRYPOINT ["impala"]

FROM packages AS learner-packages
ARG LEARNER_TORCH_INDEX_URL=
RUN [ -z "$LEARNER_TORCH_INDEX_URL" ] || { \
      pip uninstall --yes torch \
   && pip install -c constraints.txt --extra-index-url "$LEARNER_TORCH_INDEX_URL" torch \
   && eval "$TRIM_TORCH"; }

FROM runtime AS learner
COPY --from=learner-packages /opt/impala /opt/impala
COPY --from=project /opt/project /opt/impala
RUN impala --version && python -c 'import torch'
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="impala-learner" \
      org.opencontainers.image.description="IMPALA for Kubernetes: learner" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
USER 10001:10001
ENTRYPOINT ["impala"]
