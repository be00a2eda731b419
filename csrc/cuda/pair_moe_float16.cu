// Kernels of pair_moe for float16.
#include "cuda/pair_launch.cuh"

namespace flmoe::cuda {

template int pair_block_rows<Float16>(int);
template cudaError_t launch_pairs<Float16>(PairMode, const PairLaunch&, int, cudaStream_t);

}  // namespace flmoe::cuda
