# The image of the server. Multi-stage: toolchain, dependencies, binary, small runtime. The processor's variant:
#
#   docker build -t tinyllava-server .
#
# and NVIDIA's, which nobody has built yet (docs/gpu.md):
#
#   docker build -t tinyllava-server:cuda --build-arg FEATURES=cuda \
#     --build-arg BUILD_IMAGE=docker.io/nvidia/cuda:12.8.1-devel-ubuntu24.04 \
#     --build-arg RUNTIME_IMAGE=docker.io/nvidia/cuda:12.8.1-runtime-ubuntu24.04 .
#
# Base images are arguments also so that a mirror, or a digest, can stand in for them.
ARG RUST_IMAGE=docker.io/library/rust:1.95-bookworm
# The base of the rust image: brings the C compiler.
ARG BUILD_IMAGE=docker.io/library/buildpack-deps:bookworm
ARG RUNTIME_IMAGE=docker.io/library/debian:bookworm-slim

# hadolint ignore=DL3006
FROM ${RUST_IMAGE} AS rust

# --- Build ---
# hadolint ignore=DL3006
FROM ${BUILD_IMAGE} AS build
COPY --from=rust /usr/local/rustup /usr/local/rustup
COPY --from=rust /usr/local/cargo /usr/local/cargo
ENV RUSTUP_HOME=/usr/local/rustup CARGO_HOME=/usr/local/cargo PATH=/usr/local/cargo/bin:$PATH
WORKDIR /build
ARG FEATURES=""
# Dependencies first, for an empty crate: this layer stands until Cargo.toml or Cargo.lock changes.
COPY Cargo.toml Cargo.lock ./
RUN mkdir -p src tests/integration \
    && touch src/lib.rs tests/integration/main.rs \
    && echo 'fn main() {}' > src/main.rs \
    && cargo build --locked --release --bin tinyllava --features "$FEATURES" \
    && rm -r src
COPY . .
# What was copied may be older than the empty crate's artefacts.
RUN touch src/lib.rs src/main.rs \
    && cargo build --locked --release --bin tinyllava --features "$FEATURES"

# --- Runtime ---
# hadolint ignore=DL3006
FROM ${RUNTIME_IMAGE} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tinyllava-server" \
      org.opencontainers.image.description="HTTP inference server with streaming reasoning output for TinyLLaVA-Video-R1" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# ffmpeg decodes, prlimit (util-linux) limits it; versions are those of the base's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates ffmpeg util-linux \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* \
    && mkdir -p /data/models /data/files \
    && chown -R 10001:10001 /data
COPY --from=build /build/target/release/tinyllava /usr/local/bin/tinyllava
COPY LICENSE /usr/share/doc/tinyllava/LICENSE
# Downloaded models and uploaded files; besides, only /tmp is written to. Both may be mounts under a read-only root.
ENV HF_HOME=/data/models \
    TINYLLAVA_FILES_DIR=/data/files \
    TINYLLAVA_LOG_FORMAT=json
VOLUME ["/data"]
USER 10001:10001
WORKDIR /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["/usr/local/bin/tinyllava", "health"]
ENTRYPOINT ["/usr/local/bin/tinyllava"]
CMD ["serve", "--host", "0.0.0.0"]
