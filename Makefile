# `make demo` and `make test` do everything on a fresh Debian or Ubuntu with Rust.
.PHONY: demo test test-clients test-deploy test-balancer test-gateways test-image check check-cuda test-cuda bench-micro build build-cuda gpu-check openapi serve clean

demo: ## Build, start the server on the embedded model, ask it about real videos
	@scripts/demo.sh

test: ## All tests, with real sockets, real ffmpeg and real videos
	@scripts/need-ffmpeg.sh
	cargo test --locked

test-clients: ## The clients and agent libraries people use, and a fuzzer, against the binary that `make test` built
	@scripts/test-clients.sh

test-deploy: ## The files in deploy/, with the tools that read them
	@scripts/test-deploy.sh
	@scripts/test-kubernetes.sh

test-balancer: ## Restarts, crashes and streams behind HAProxy and nginx, with the binary that `make test` built
	@scripts/test-balancer.sh

test-gateways: ## smg, vllm-router and Dynamo's KV indexer before several servers, with the binary that `make test` built
	@scripts/test-gateways.sh

test-image: ## Build the image as the Dockerfile says, without an engine, and serve from it (root, a quarter of an hour)
	@scripts/test-image.sh

check: ## What CI checks before the tests
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps

check-cuda: ## Type check and clippy of the CUDA code, without a toolkit
	@scripts/check-cuda.sh

test-cuda: ## The CUDA code at work, on a GPU that the processor plays: no GPU, driver or toolkit is needed
	@scripts/test-cuda.sh

bench-micro: ## Criterion benches of what runs for every token beside the model's products
	cargo bench --locked --bench pure_parts

build: ## The release binary, target/release/tinyllava
	cargo build --locked --release

build-cuda: ## The release binary for GPUs, target/cuda/release/tinyllava; a toolkit is fetched if there is none
	@scripts/build-cuda.sh

gpu-check: ## On a machine with a GPU: right numbers, then times, of the binary that `make build-cuda` built
	@scripts/gpu-check.sh

openapi: ## Write openapi.yaml anew, from the types in src/http
	cargo run --locked --quiet -- openapi > openapi.yaml.new && mv openapi.yaml.new openapi.yaml

serve: build
	target/release/tinyllava serve

clean:
	cargo clean
