# lladaflow on NVIDIA GPUs. PyPI's torch for Linux brings its CUDA libraries along; the host needs a driver for them
# (torch 2.13: CUDA 13, driver 580 or newer) and the NVIDIA container toolkit.
#   docker build -t lladaflow .
#   docker run --rm --gpus all lladaflow llada doctor
#   docker run --rm --gpus all -v "$PWD/mine:/work" lladaflow llada init .       # once, in an empty folder
#   docker run --rm --gpus all -v "$PWD/mine:/work" lladaflow llada run smoke
#   docker run --rm --gpus all -v "$PWD/mine:/work" -p 7860:7860 lladaflow llada app --host 0.0.0.0      # llada serve: 8000
FROM python:3.12-slim-bookworm

RUN apt-get update && apt-get install -y --no-install-recommends git make g++ && rm -rf /var/lib/apt/lists/*

# The packages lie in a layer of their own, so that a change of code does not install them anew.
WORKDIR /opt/lladaflow
COPY constraints.txt pyproject.toml setup.py README.md LICENSE ./
COPY llada_core llada_core
COPY tasks tasks
COPY flows flows
COPY app app
COPY cli cli
COPY profiles profiles
COPY params.yaml dvc.yaml prefect.yaml Makefile AGENTS.md CONTRIBUTING.md .gitignore .dvcignore ./
COPY .dvc/config .dvc/config
RUN pip install --no-cache-dir -c constraints.txt '.[all,zero,4bit]'

# A project to try; a volume at /work takes its place. The volume is somebody else's than root's, which git refuses unasked.
RUN git config --system --add safe.directory '*' && llada init /work
WORKDIR /work
ENV DVC_NO_ANALYTICS=1 DO_NOT_TRACK=1 MLFLOW_DISABLE_TELEMETRY=true GRADIO_ANALYTICS_ENABLED=False HF_HUB_DISABLE_TELEMETRY=1
EXPOSE 7860 8000 5000 4200
CMD ["llada", "--help"]
