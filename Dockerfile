FROM pytorch/pytorch:2.7.1-cuda12.6-cudnn9-devel

# g++ compiles the CPU kernels.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

COPY . /opt/rocket
# The image's own torch satisfies rocket's requirement and stays.
RUN cd /opt/rocket \
    && pip install --no-cache-dir '.[report]' \
    && pip install --no-cache-dir --no-deps -r requirements/demo.txt

# docker run --gpus all -v "$PWD:/workspace" IMAGE run --config my.yaml
WORKDIR /workspace
ENTRYPOINT ["rocket"]
CMD ["--help"]
