// Kernels of pair_moe for bfloat16.
#include "cuda/pair_launch.cuh"

namespace flmoe::cuda {

template int pair_block_rows<BFloat16>(int);
template cudaError_t launch_pairs<BFloat16>(PairMode, const PairLaunch&, int, cudaStream_t);

}  // namespace flmoe::cuda
