#pragma once

namespace fastshape::cuda {

// Gives torch the CUDA kernels of the ops that fastshape/_ops.py declares. Once; later calls do nothing.
void register_ops();

}  // namespace fastshape::cuda
