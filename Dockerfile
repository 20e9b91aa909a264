# Two images. `serve` answers requests with a ct2 or onnx export and has no torch; `full` has every
# command:
#
#   docker build --target serve -t dsbs-serve .
#   docker run -p 127.0.0.1:8000:8000 -v "$PWD/EXPORT:/student:ro" dsbs-serve
#
#   docker build --target full -t dsbs .
#   docker run --user "$(id -u)" -v "$PWD:/work" -e OPENAI_API_KEY dsbs run recipe.yaml

FROM python:3.11-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim AS serve
COPY --from=wheel /wheels /wheels
# All that an export needs of dsbs's dependencies.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir \
      'ctranslate2>=4.8' \
      'fastapi>=0.115' \
      'filelock>=3.12' \
      'jinja2>=3.1' \
      'onnxruntime>=1.22' \
      'pydantic>=2.12' \
      'tokenizers>=0.22' \
      'typer>=0.15' \
      'uvicorn>=0.34' \
    && pip install --no-cache-dir --no-deps /wheels/*.whl \
    && useradd --uid 1000 --create-home dsbs
USER 1000
EXPOSE 8000
ENTRYPOINT ["dsbs", "serve", "/student", "--host", "0.0.0.0"]

FROM python:3.11-slim AS full
# For an NVIDIA GPU: --build-arg TORCH_INDEX=https://pypi.org/simple
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --from=wheel /wheels /wheels
COPY constraints.txt /wheels/
RUN pip install --no-cache-dir --constraint /wheels/constraints.txt --index-url "$TORCH_INDEX" torch \
    && set -- /wheels/*.whl \
    && pip install --no-cache-dir --constraint /wheels/constraints.txt \
      "$1[ct2,gguf,local,lora,onnx,serve,tensorboard]" \
    && useradd --uid 1000 --create-home dsbs
ENV HOME=/home/dsbs
USER 1000
WORKDIR /work
ENTRYPOINT ["dsbs"]
