# SPDX-License-Identifier: MIT
# docker build -t hex . && docker run --rm --gpus all --ipc=host -v "$PWD/runs:/work/runs" hex
FROM python:3.11.11-slim-bookworm
RUN useradd --create-home --uid 1000 hex && mkdir -p /work/runs && chown -R hex /work
WORKDIR /work
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY hex.py test_hex.py ./
USER hex
VOLUME /work/runs
CMD ["python", "hex.py"]
