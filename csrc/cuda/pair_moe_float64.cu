// Kernels of pair_moe for float64.
#include "cuda/pair_launch.cuh"

namespace flmoe::cuda {

template int pair_block_rows<double>(int);
template cudaError_t launch_pairs<double>(PairMode, const PairLaunch&, int, cudaStream_t);

}  // namespace flmoe::cuda
