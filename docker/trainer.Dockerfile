# The trainer: `python -m trainer` with everything that it was locked to. Builds with BuildKit and without it.
#
# BASE_IMAGE: any Debian or Ubuntu with Python 3.11 to 3.13 in its archive, on x86-64. torch's wheels bring CUDA's libraries; from
# NVIDIA's base comes only what lets its container runtime in (13.0: what requirements/torch.txt is built for).
# LOCK: trainer, or demo without unsloth for a machine that has no card.
ARG BASE_IMAGE=nvidia/cuda:13.0.3-base-ubuntu24.04
FROM ${BASE_IMAGE}
# Compilers and Python.h stay: Triton builds its launcher, and torch.compile its kernels, at run time.
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      ca-certificates g++ gcc libgomp1 python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
ENV UV_NO_CACHE=1 VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:/opt/uv/bin:$PATH
RUN echo uv==0.13.9 --hash=sha256:d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19 >/tmp/uv.txt \
 && python3 -m venv /opt/uv \
 && /opt/uv/bin/pip install --quiet --no-cache-dir --no-deps --only-binary :all: --require-hashes -r /tmp/uv.txt \
 && uv venv --quiet --python /usr/bin/python3 /opt/venv
# torch has a layer of its own: it is half of the image and changes least.
COPY requirements/torch.txt /tmp/torch.txt
RUN uv pip install --quiet --no-deps --require-hashes -r /tmp/torch.txt
ARG LOCK=trainer
COPY requirements/${LOCK}.txt /tmp/lock.txt
RUN uv pip install --quiet --no-deps --require-hashes -r /tmp/lock.txt && uv pip check --quiet
# A volume takes these directories' mode when it is made: whoever the caller is may write there.
RUN mkdir -p /trinity/data /trinity/output /trinity/.cache/home /trinity/.cache/tmp && chmod 1777 /trinity/.cache /trinity/.cache/*
COPY trainer /trinity/trainer
RUN chmod -R a+rX /trinity/trainer
# Everything that can be made again lies in one volume (the trainer puts Triton's, inductor's and unsloth's caches there itself).
# A caller's number has no name in this image: torch asks for LOGNAME before it looks for one. Threads that wait shall sleep: spinning
# ones made a step on two cores that others used too four times as long.
ENV HOME=/trinity/.cache/home TMPDIR=/trinity/.cache/tmp HF_HOME=/trinity/.cache/huggingface \
    PYTHONPYCACHEPREFIX=/trinity/.cache/python PYTHONUNBUFFERED=1 LOGNAME=trainer OMP_WAIT_POLICY=passive
WORKDIR /trinity
USER 10001:10001
ENTRYPOINT ["python", "-m", "trainer"]
CMD ["--help"]
