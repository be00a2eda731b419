// Kernels of pair_moe for float32.
#include "cuda/pair_launch.cuh"

namespace flmoe::cuda {

template int pair_block_rows<float>(int);
template cudaError_t launch_pairs<float>(PairMode, const PairLaunch&, int, cudaStream_t);

}  // namespace flmoe::cuda
