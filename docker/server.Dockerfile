# Gateway and loader: what requirements/server.txt names and the server's own code; no torch, no compiler, nobody's root.
# Builds with BuildKit and without it. BASE_IMAGE: any Debian or Ubuntu with Python 3.11 to 3.13 and its venv.
ARG BASE_IMAGE=python:3.13-slim-bookworm

FROM ${BASE_IMAGE} AS packages
COPY requirements/server.txt /tmp/server.txt
# pip itself stays behind: nothing is installed later.
RUN python3 -m venv --without-pip /opt/venv \
 && python3 -m venv /tmp/pip \
 && /tmp/pip/bin/pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --require-hashes -r /tmp/server.txt

FROM ${BASE_IMAGE}
# llama.cpp of the embedded engine computes with OpenMP.
RUN ldconfig -p | grep -q 'libgomp\.so\.1 ' \
 || { apt-get update -qq && apt-get install -y -qq --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*; }
# A volume that is mounted on these gets their owner when it is made.
RUN mkdir -p /trinity/output/gguf /trinity/output/state && chown 10001:10001 /trinity/output/state
COPY --from=packages /opt/venv /opt/venv
COPY server /trinity/server
RUN chmod -R a+rX /trinity/server && /opt/venv/bin/python -m compileall -q /trinity/server
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /trinity
USER 10001:10001
EXPOSE 8080
ENTRYPOINT ["python", "-m", "server"]
