#pragma once

namespace fastshape::cpu {

// Gives torch the CPU kernels of the ops that fastshape/_ops.py declares. Once; later calls do nothing.
void register_ops();

}  // namespace fastshape::cpu
