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

// What the plans need to know of a device; the current one stays current. This needs a context on the device.
Device describe_device(int index);

// Makes a device current for the launches. The runtime linked into this library is not torch's, and
// follows its choice only through the driver.
void use_device(int index);

// The newest CUDA that the driver knows, as 1000 major + 10 minor (0 without a driver). It needs no context.
int driver_version();

// The counter of a device's stream, at 0 between launches; whoever counts with it leaves it at 0 (arrives_last).
// Null while the stream is captured, because a graph may be replayed on any stream, and where there is none
// to be had.
unsigned* stream_ticket(int device, void* stream);

// A kernel that does nothing, of which the runtime is asked.
const void* probe_kernel();

}  // namespace kdkernels::cuda
