# For cargo, to be sourced: what stands in for a CUDA toolkit. What is built lies with ordinary builds, to share all that has nothing to do
# with CUDA: `cargo clean -p candle-kernels -p mistralrs-paged-attn` before one with `--features cuda` and a real nvcc.
no_cuda=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
target=${CARGO_TARGET_DIR:-target}
NVRTC_DIR=$(realpath -m "$target/nvrtc") PATH=$no_cuda:$PATH
export NVRTC_DIR PATH CUDA_COMPUTE_CAP=90
python3 -m pip --version >/dev/null 2>&1 || "$no_cuda/../install.sh" "to fetch NVRTC" python3-pip
"$no_cuda/ptx.py" fetch
