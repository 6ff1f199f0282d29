// Launches that belong to no rule. Plain C++: the operators include it without CUDA's headers.
#pragma once

#include "task.h"

namespace kdkernels::cuda {

// In how many parts the valid rows are counted.
int count_parts(int64_t rows);

// Counts the rows whose target is not `ignored` into counts[parts] (unless null), and zeroes *ticket.
void prepare_rows(const int64_t* target, int64_t rows, int64_t ignored, int64_t* counts, int parts,
                  unsigned* ticket, void* stream);

// gradient *= *upstream (float or double), reading the factor on the device.
void scale(void* gradient, Scalar type, int64_t size, const void* upstream, Scalar upstream_type,
           const Device& device, void* stream);

// What the plans need to know of a device, which becomes the current one.
Device describe_device(int index);

// Makes a device current for the launches. The runtime linked into this library is not torch's, and
// follows its choice only through the driver.
void use_device(int index);

}  // namespace kdkernels::cuda
