# For cargo, to be sourced: what stands in for a CUDA toolkit. What nvcc's stand-in writes lies where an ordinary build with `--features
# cuda` would look for it: `cargo clean -p candle-kernels -p mistralrs-paged-attn` before one.
no_cuda=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
target=${CARGO_TARGET_DIR:-target}
NVRTC_DIR=$(realpath -m "$target/nvrtc") PATH=$no_cuda:$PATH
export NVRTC_DIR PATH CUDA_COMPUTE_CAP=90
"$no_cuda/ptx.py" fetch
