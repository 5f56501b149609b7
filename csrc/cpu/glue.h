#pragma once

namespace fastshape::cpu {

// Registers the CPU kernels of the ops in fastshape/_ops.py with torch. Calls after the first do nothing.
void register_ops();

}  // namespace fastshape::cpu
