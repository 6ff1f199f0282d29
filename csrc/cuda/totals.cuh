// The sum of what all threads of a launch have, in a fixed order, without another launch.
#pragma once

#include "groups.cuh"

namespace kdkernels::cuda {

// Adds up the values of a block's threads, in the order of the threads; thread 0 has the sum.
KDK_DEVICE double add_up_block(double value) {
  double sum[1] = {value};
  sync_block();  // the exchange may still be read
  Block block;
  block.reduce<Sum>(sum);
  return sum[0];
}

// The blocks' values in order, by one block.
template <class R>
KDK_DEVICE void add_up_blocks(const double* partials, void* total) {
  double value = 0;
  for (int i = thread_index(); i < block_count(); i += thread_count())
    value += load_fresh(partials + i);
  value = add_up_block(value);
  if (thread_index() == 0) *static_cast<R*>(total) = R(value);
}

// All threads of the grid call it, with the ticket at 0, where it is left; the block that comes last adds up.
template <class R>
KDK_DEVICE void add_up(double value, double* partials, unsigned* ticket, void* total) {
  value = add_up_block(value);
  bool* const last = reinterpret_cast<bool*>(shared_memory() + kBlockExchange);
  if (thread_index() == 0) {
    partials[block_index()] = value;
    *last = arrives_last(ticket, unsigned(block_count()));
  }
  sync_block();
  if (*last) add_up_blocks<R>(partials, total);
}

}  // namespace kdkernels::cuda
