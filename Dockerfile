# SPDX-License-Identifier: MIT
# docker build -t hex .
# docker run --rm --gpus all --shm-size=32g -v hex-runs:/work/runs hex
# docker run --rm --gpus all --shm-size=32g -v hex-runs:/work/runs -v DIR:/data:ro hex \
#     torchrun --nproc-per-node 8 hex.py --data imagenet --root /data
FROM python:3.11.7-slim-bookworm
RUN useradd --create-home --uid 1000 hex && mkdir -p /work/runs && chown -R hex:hex /work
WORKDIR /work
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY hex.py test_hex.py README.md ./
USER hex
# A named volume takes this folder's owner; a folder of the host that is mounted here must be writable by user 1000.
VOLUME /work/runs
CMD ["python", "hex.py"]
