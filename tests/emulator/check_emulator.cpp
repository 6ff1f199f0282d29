// Checks of the emulator itself: `check_emulator NAME` runs one and prints what went wrong;
// `check_emulator narrow f16|bf16` converts floats on stdin to the bits that it prints.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "checks.h"
#include "cuda/device.cuh"

using namespace kdkernels::cuda;

namespace {

// The launch must fail with a message that contains all of `parts`.
void demand_error(const std::function<void()>& launch, const std::vector<std::string>& parts) {
  std::string message;
  try {
    launch();
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  for (const auto& part : parts)
    demand(message.find(part) != std::string::npos, "no '" + part + "' in '" + message + "'");
}

// The sums of `threads` numbers in each block, by shuffles and shared memory; in every thread.
template <bool synchronised>
KDK_DEVICE double block_sum(double x) {
  double* const parts = reinterpret_cast<double*>(shared_memory());
  for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
  if (thread_index() % 32 == 0) parts[thread_index() / 32] = x;
  if (synchronised) sync_block();
  x = 0.0;
  for (int warp = 0; warp < thread_count() / 32; ++warp) x += parts[warp];
  return x;
}

template <bool synchronised>
KDK_KERNEL void KDK_BOUNDS(1024, 1) sum_blocks(const float* in, double* out) {
  const int i = block_index() * thread_count() + thread_index();
  out[i] = block_sum<synchronised>(in[i]);
}

std::vector<float> numbers(size_t n) {
  std::vector<float> x(n);
  for (size_t i = 0; i < n; ++i) x[i] = float(i * 7919 % 1009) - 500.0f;
  return x;
}

void block_reduction() {
  for (int blocks = 1; blocks <= 4; ++blocks)
    for (int threads = 32; threads <= 1024; threads += threads < 128 ? 32 : 128)
      for (emulator_seed = 0; emulator_seed < 3; ++emulator_seed) {
        const auto in = numbers(size_t(blocks) * threads);
        std::vector<double> out(in.size());
        emulate({blocks, threads, 1, 32 * sizeof(double)}, sum_blocks<true>, in.data(), out.data());
        for (size_t i = 0; i < in.size(); ++i) {
          const auto first = in.begin() + i / threads * threads;
          demand(out[i] == std::accumulate(first, first + threads, 0.0), "wrong sum");
        }
      }
}

void missing_barrier() {
  const auto in = numbers(256);
  std::set<std::string> results;
  for (emulator_seed = 0; emulator_seed < 10; ++emulator_seed) {
    std::vector<double> out(256), again(256);
    emulate({1, 256, 1, 64}, sum_blocks<false>, in.data(), out.data());
    emulate({1, 256, 1, 64}, sum_blocks<false>, in.data(), again.data());
    const auto text = [](const std::vector<double>& x) {
      return std::string(reinterpret_cast<const char*>(x.data()), x.size() * sizeof(double));
    };
    demand(text(out) == text(again), "a seed does not determine the result");
    results.insert(text(out));
  }
  demand(results.size() >= 8, "the seed hardly changes the result");
}

void shuffles() {
  const auto kernel = [](int* out) {
    int x = thread_index();
    for (int step = 0; step < 20; ++step) x = shuffle(x, (thread_index() + 1) % 32);
    const f16 y = shuffle(f16{uint16_t(thread_index())}, 3);
    sync_warp();
    out[thread_index()] = x * 1000 + y.bits;
  };
  for (emulator_seed = 0; emulator_seed < 10; ++emulator_seed) {
    std::vector<int> out(64);
    emulate({1, 64}, kernel, out.data());
    for (int i = 0; i < 64; ++i)
      demand(out[i] == (i / 32 * 32 + (i + 20) % 32) * 1000 + i / 32 * 32 + 3, "wrong lane");
  }
}

void cluster_reduction() {
  const auto kernel = [](const float* in, double* out) {
    double* const mine = reinterpret_cast<double*>(shared_memory()) + 32;
    const double sum = block_sum<true>(in[block_index() * thread_count() + thread_index()]);
    if (thread_index() == 0) *mine = sum;
    sync_cluster();
    double total = 0.0;
    for (int rank = 0; rank < cluster_size(); ++rank) total += *cluster_shared(mine, rank);
    sync_cluster();
    if (thread_index() == 0) out[block_index()] = total * (cluster_rank() + 1);
  };
  for (int cluster : {1, 2, 4, 8}) {
    const auto in = numbers(8 * 96);
    std::vector<double> out(8);
    emulate({8, 96, cluster, 33 * sizeof(double)}, kernel, in.data(), out.data());
    for (int block = 0; block < 8; ++block) {
      const auto first = in.begin() + block / cluster * cluster * 96;
      const double expected = std::accumulate(first, first + cluster * 96, 0.0);
      demand(out[block] == expected * (block % cluster + 1), "wrong sum of a cluster");
    }
  }
}

// A kernel of two phases: what one block writes, another reads.
KDK_KERNEL void two_phases(int* numbers, int* sums) {
  const int i = block_index() * thread_count() + thread_index();
  const int count = block_count() * thread_count();
  numbers[i] = i;
  sync_grid();
  sums[i] = load_fresh(&numbers[(i + 7 * thread_count()) % count]) + numbers[count - 1 - i];
}

void grid_sync() {
  std::vector<int> numbers(16 * 64), sums(16 * 64);
  LaunchShape shape{16, 64};
  shape.cooperative = true;
  emulate(shape, two_phases, numbers.data(), sums.data());
  for (int i = 0; i < 1024; ++i) demand(sums[i] == (i + 448) % 1024 + 1023 - i, "wrong sum");
  shape.cooperative = false;
  demand_error([&] { emulate(shape, two_phases, numbers.data(), sums.data()); }, {"sync_grid"});
}

// Copies pieces of `in` through two buffers, in uses of their barriers that take turns.
struct Faults {
  bool no_wait, no_sync, no_fence, no_fence_bulk;
  uint32_t wrong_bytes, wrong_parity, offset;
};
KDK_KERNEL void copy_pieces(const int* in, int* out, int pieces, Faults faults) {
  auto* const barriers = reinterpret_cast<Barrier*>(shared_memory());
  int* const buffer = reinterpret_cast<int*>(shared_memory() + 128);
  const int thread = thread_index(), count = thread_count();
  const uint32_t bytes = uint32_t(count * sizeof(int));
  if (thread == 0) {
    for (int i = 0; i < 2; ++i) barrier_init(&barriers[i]);
    if (!faults.no_fence) fence_barriers();
  }
  if (!faults.no_sync) sync_block();
  const auto start = [&](int piece) {
    if (thread != 0 || piece >= pieces) return;
    barrier_expect(&barriers[piece % 2], bytes + faults.wrong_bytes);
    bulk_load(buffer + piece % 2 * count, in + piece * count + faults.offset, bytes,
              &barriers[piece % 2]);
  };
  for (int piece = 0; piece < 2; ++piece) start(piece);
  for (int piece = 0; piece < pieces; ++piece) {
    if (!faults.no_wait) barrier_wait(&barriers[piece % 2], piece / 2 % 2 ^ faults.wrong_parity);
    const int from = (thread + 1) % count;
    const Bits16 four = load16_shared(buffer + piece % 2 * count + from / 4 * 4);
    out[piece * count + thread] = int(four.word[from % 4]);
    if (!faults.no_fence_bulk || thread != 5) fence_bulk();
    sync_block();
    start(piece + 2);
  }
}

void bulk_copy() {
  constexpr int kThreads = 64, kPieces = 7;
  alignas(16) static int in[kThreads * kPieces + 4];
  std::iota(in, std::end(in), 0);
  std::vector<int> out(kThreads * kPieces);
  const LaunchShape shape{1, kThreads, 1, 128 + 2 * kThreads * sizeof(int)};
  const auto run = [&](int pieces, const Faults& faults) {
    emulate(shape, copy_pieces, static_cast<const int*>(in), out.data(), pieces, faults);
  };
  for (emulator_seed = 0; emulator_seed < 20; ++emulator_seed) {
    run(kPieces, {});
    for (int i = 0; i < kThreads * kPieces; ++i)
      demand(out[i] == i / kThreads * kThreads + (i + 1) % kThreads, "wrong copy");
    Faults faults{};
    faults.wrong_parity = 1;
    demand_error([&] { run(kPieces, faults); }, {"block 0, thread ", "parity"});
    faults = {};
    faults.no_wait = true;
    demand_error([&] { run(2, faults); }, {"nobody waited"});
    demand_error([&] { run(3, faults); }, {"emulate: "});
    faults = {};
    faults.wrong_bytes = 16;
    demand_error([&] { run(2, faults); }, {"barrier_wait (so 64", "lacks 16 bytes"});
    faults = {};
    faults.wrong_bytes = uint32_t(-16);
    demand_error([&] { run(2, faults); }, {"more bytes"});
    faults = {};
    faults.offset = 1;
    demand_error([&] { run(2, faults); }, {"block 0, thread 0", "misaligned"});
    faults = {};
    faults.no_fence = true;
    demand_error([&] { run(2, faults); }, {"fence_barriers"});
    faults = {};
    faults.no_sync = true;
    demand_error([&] { run(2, faults); }, {"barrier"});
    faults = {};
    faults.no_fence_bulk = true;
    run(2, faults);  // nothing is copied to a place that was read
    demand_error([&] { run(3, faults); }, {"bulk_load: thread 5 has read there", "fence_bulk"});
  }
}

// Each block of a cluster hands every other one a number a round, in four places taken in turn.
struct Handing {
  int rounds;
  uint32_t wrong_bytes;
  bool no_sync, narrow = false;
};
KDK_KERNEL void hand_around(float* out, Handing handing) {
  auto* const barriers = reinterpret_cast<Barrier*>(shared_memory());
  auto* const places = reinterpret_cast<float(*)[8][4]>(shared_memory() + 128);
  const int lane = thread_index(), blocks = cluster_size();
  if (lane == 0) {
    for (int i = 0; i < 4; ++i) barrier_init(&barriers[i]);
    fence_barriers();
  }
  if (!handing.no_sync) sync_cluster();
  for (int round = 0; round < handing.rounds + 1; ++round) {
    const int place = round % 4;
    if (round < handing.rounds) {
      if (lane == 0) barrier_expect(&barriers[place], uint32_t(16 * blocks) + handing.wrong_bytes);
      const Four four{{float(100 * round + block_index()), 0, 0, 0}};
      if (lane < blocks) store_remote(places[place][cluster_rank()], four, &barriers[place], lane);
    }
    if (round == 0) continue;
    const int before = (round - 1) % 4;
    const auto wait = handing.narrow ? barrier_wait : barrier_wait_cluster;
    wait(&barriers[before], unsigned((round - 1) / 4) % 2);
    float sum = lane < blocks ? places[before][lane][0] : 0;
    for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) out[block_index() * handing.rounds + round - 1] = sum;
  }
  sync_cluster();
}

void remote_stores() {
  constexpr int kRounds = 11, kBlocks = 8;
  std::vector<float> out(kRounds * kBlocks);
  const auto run = [&](int cluster, Handing handing) {
    emulate({kBlocks, 32, cluster, 128 + 4 * 8 * 16}, hand_around, out.data(), handing);
  };
  for (emulator_seed = 0; emulator_seed < 20; ++emulator_seed) {
    for (int cluster : {1, 2, 8}) {
      run(cluster, {kRounds, 0, false});
      for (int block = 0; block < kBlocks; ++block) {
        const int first = block / cluster * cluster;
        for (int round = 0; round < kRounds; ++round)
          demand(out[block * kRounds + round] ==
                     cluster * (100 * round + first) + cluster * (cluster - 1) / 2,
                 "wrong sum of a round");
      }
    }
    demand_error([&] { run(2, {1, 16, false}); }, {"deadlock", "barrier_wait", "lacks 16 bytes"});
    demand_error([&] { run(2, {kRounds, uint32_t(-16), false}); }, {"emulate: "});
    demand_error([&] { run(2, {1, 0, true}); }, {"barrier"});
    demand_error([&] { run(2, {1, 0, false, true}); }, {"barrier_wait_cluster"});
  }
}

// Copies wait for all groups but the last ones.
KDK_KERNEL void copy_groups(const int* in, int* out) {
  int* const buffer = reinterpret_cast<int*>(shared_memory());
  for (int group = 0; group < 3; ++group) {
    copy16_async(buffer + 4 * group, in + 4 * group);
    commit_copies();
  }
  wait_copies<2>();
  for (int group = 0; group < 3; ++group) out[group] = buffer[4 * group];
  wait_copies<1>();
  for (int group = 0; group < 3; ++group) out[3 + group] = buffer[4 * group];
  commit_copies();  // of nothing
  wait_copies<1>();
  for (int group = 0; group < 3; ++group) out[6 + group] = buffer[4 * group];
  wait_copies();
}

void groups_of_copies() {
  alignas(16) static int in[12];
  std::iota(in, std::end(in), 0);
  std::vector<int> out(9);
  emulate({1, 1, 1, 48}, copy_groups, static_cast<const int*>(in), out.data());
  const std::vector<int> expected{0, -1, -1, 0, 4, -1, 0, 4, 8};
  demand(out == expected, "a group came too early, or too late");
  const auto forgotten = [](const int* from) { copy16_async(shared_memory(), from); };
  const auto uncommitted = [](const int* from) {
    copy16_async(shared_memory(), from);
    wait_copies();
  };
  const int* const from = in;
  demand_error([&] { emulate({1, 1, 1, 16}, forgotten, from); }, {"did not wait"});
  demand_error([&] { emulate({1, 1, 1, 16}, uncommitted, from); }, {"not committed"});
}

void largest_of_a_warp() {
  const auto kernel = [](float* out) {
    const float x = float((thread_index() * 13) % 32) - 40.0f;
    out[thread_index()] = warp_max(thread_index() == 7 ? -HUGE_VALF : x);
  };
  std::vector<float> out(32);
  emulate({1, 32}, kernel, out.data());
  for (float x : out) demand(x == -9.0f, "wrong maximum");
}

template <class T>
void check_bits(uint16_t infinity) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float x = widen(T{uint16_t(bits)});
    const bool nan = (bits & 0x7fff) > infinity;
    demand(std::isnan(x) == nan, "NaN");
    demand(narrow<T>(x).bits == (nan ? 0x7fff : bits), "bits " + std::to_string(bits));
  }
}

void conversions() {
  check_bits<f16>(0x7c00);
  check_bits<bf16>(0x7f80);
  demand(narrow<float>(0.1) == 0.1f && narrow<double>(0.1f) == double(0.1f), "narrow");
}

void arithmetic() {
  demand(power_of_two(-126.0f) == 0x1p-126f && power_of_two(-126.5f) == 0.0f, "denormal");
  demand(power_of_two(10.0f) == 1024.0f && power_of_two(128.0f) == HUGE_VALF, "power_of_two");
  demand(power_of_two(-HUGE_VALF) == 0.0f && std::isnan(power_of_two(NAN)), "power_of_two");
  demand(power_of_two(-1030.0) == 0x1p-1030, "power_of_two of a double");
  volatile float a = 1.0f + 0x1p-12f;
  demand(product(a, a) - (1.0f + 0x1p-11f) == 0.0f, "contracted");
}

void deadlock() {
  // One thread of warp 1 leaves out the barrier; then all warps but one.
  const auto skip_one = [] {
    if (thread_index() != 37) sync_block();
  };
  demand_error([&] { emulate({1, 64}, skip_one); },
               {"deadlock", "block 0, thread 0 waits in sync_block (so 63 of",
                "block 0, thread 37 has returned (so 1 of"});
  const auto skip_most = [] {
    thread_index() < 32 ? sync_block() : void();
  };
  demand_error([&] { emulate({2, 96}, skip_most); },
               {"deadlock", "thread 0 waits in sync_block", "thread 32 has returned"});
  const auto lanes_leave = [] {
    if (thread_index() % 32 < 31) shuffle_xor(1.0f, 1);
  };
  demand_error([&] { emulate({1, 32}, lanes_leave); }, {"deadlock", "waits in shuffle (so 31"});
  const auto lanes_differ = [] { thread_index() % 2 ? sync_warp() : void(shuffle(1, 0)); };
  demand_error([&] { emulate({1, 32}, lanes_differ); }, {"block 0, thread ", "of its warp waits"});
  const auto barriers_differ = [] { thread_index() < 32 ? sync_block() : sync_cluster(); };
  demand_error([&] { emulate({1, 64}, barriers_differ); }, {"in sync_block", "in sync_cluster"});
  const auto blocks_differ = [] { cluster_rank() ? sync_cluster() : void(); };
  demand_error([&] { emulate({2, 32, 2}, blocks_differ); }, {"block 1, thread 0 waits in sync_cl"});
  demand_error([&] { emulate({1, 48}, [] { sync_warp(); }); }, {"fewer than 32"});
  // The emulator is usable afterwards.
  block_reduction();
}

void shared_overflow() {
  const auto write = [](int at) {
    if (thread_index() == 5) shared_memory()[at] = 1;
  };
  emulate({3, 32, 1, 100}, write, 99);
  emulate({3, 32, 1, 100}, write, 0);
  demand_error([&] { emulate({3, 32, 1, 100}, write, 100); }, {"overflow", "0 bytes after"});
  demand_error([&] { emulate({1, 32, 1, 100}, write, 164); }, {"overflow", "64 bytes after"});
  demand_error([&] { emulate({4, 32, 2, 100}, write, -1); }, {"overflow", "1 bytes before"});
  demand_error([&] { emulate({1, 32}, write, 0); }, {"overflow"});
  const auto untouched = [](float* out) {
    out[thread_index()] = reinterpret_cast<float*>(shared_memory())[thread_index()];
  };
  std::vector<float> out(32);
  emulate({1, 32, 1, 128}, untouched, out.data());
  for (float x : out) demand(std::isnan(x), "shared memory does not begin as NaN");
}

void alignment() {
  alignas(16) static float data[64];
  const auto load = [](const float* p) { load16(p + 4 * thread_index() + (thread_index() == 3)); };
  demand_error([&] { emulate({1, 8}, load, &data[0]); },
               {"block 0, thread 3", "load16: misaligned"});
  const auto again = [](float* p) {
    store16(p + 4 * thread_index(), {});
    load16_written(p + 4 * thread_index());
    if (thread_index() == 2) load16(p + 8);
  };
  demand_error([&] { emulate({1, 8}, again, &data[0]); }, {"thread 2", "load16_written"});
  const auto store = [](float* p) { store16(p + 4 * thread_index() + (thread_index() == 3), {}); };
  demand_error([&] { emulate({1, 8}, store, &data[0]); }, {"store16: misaligned"});
  const auto load_shared = [](int offset) { load16_shared(shared_memory() + offset); };
  emulate({1, 1, 1, 64}, load_shared, 48);
  demand_error([&] { emulate({1, 1, 1, 64}, load_shared, 8); }, {"load16_shared: misaligned"});
  demand_error([&] { emulate({1, 1, 1, 64}, load_shared, 64); }, {"not in shared memory"});
  const auto swapped = [] { load16(shared_memory()); };
  demand_error([&] { emulate({1, 1, 1, 64}, swapped); }, {"is in shared memory"});
  const auto remote = [] { *cluster_shared(shared_memory() + 64, 1) = 1; };
  demand_error([&] { emulate({2, 1, 2, 64}, remote); }, {"not in the block's shared memory"});
}

// The block that arrives last adds what the others wrote.
KDK_KERNEL void sum_last(const float* in, double* parts, unsigned* counter, double* out) {
  const double sum = block_sum<true>(in[block_index() * thread_count() + thread_index()]);
  auto* const last = reinterpret_cast<unsigned*>(shared_memory() + 256);
  if (thread_index() == 0) {
    parts[block_index()] = sum;
    *last = arrives_last(counter, unsigned(block_count()));
  }
  sync_block();
  if (!*last || thread_index() != 0) return;
  double total = 0.0;
  for (int block = 0; block < block_count(); ++block) total += load_fresh(&parts[block]);
  *out = total;
}

void last_block() {
  const auto in = numbers(50 * 64);
  for (emulator_seed = 0; emulator_seed < 20; ++emulator_seed)
    for (bool cooperative : {false, true}) {
      std::vector<double> parts(50);
      unsigned counter = 0;
      for (int turn = 0; turn < 2; ++turn) {
        double out = 0.0;
        emulate({50, 64, 1, 260, cooperative}, sum_last, in.data(), parts.data(), &counter, &out);
        demand(out == std::accumulate(in.begin(), in.end(), 0.0), "wrong total");
        demand(counter == 0, "the counter does not end at 0");
      }
      counter = 51;
      double out = 0.0;
      demand_error([&] { emulate({50, 64, 1, 260, cooperative}, sum_last, in.data(), parts.data(),
                                 &counter, &out); }, {"did not begin at 0"});
    }
}

void stack_overflow() {
#if !defined(KDK_EMULATOR_ASAN)  // which has its own answer
  const auto kernel = [] {
    volatile char array[emulator::kStackBytes];
    for (size_t i = 0; i < sizeof array; ++i) array[i] = 1;
  };
  demand_error([&] { emulate({1, 1}, kernel); }, {"block 0, thread 0: more stack"});
#endif
}

// 64 blocks of 256 threads with 30 barriers.
void speed() {
  const auto kernel = [](int* out) {
    int x = thread_index();
    for (int i = 0; i < 10; ++i) {
      sync_block();
      x = shuffle_xor(x, 1) + shuffle_xor(x, 2);
    }
    out[thread_index()] = x;
  };
  std::vector<int> out(256);
  emulate({64, 256}, kernel, out.data());
}

template <class T>
int narrow_stdin() {
  float x;
  while (std::fread(&x, sizeof x, 1, stdin) == 1) {
    const T y = narrow<T>(x);
    std::fwrite(&y, sizeof y, 1, stdout);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3) return argv[2][0] == 'f' ? narrow_stdin<f16>() : narrow_stdin<bf16>();
  const std::map<std::string, void (*)()> checks = {
      {"block_reduction", block_reduction},
      {"missing_barrier", missing_barrier},
      {"shuffles", shuffles},
      {"cluster_reduction", cluster_reduction},
      {"grid_sync", grid_sync},
      {"bulk_copy", bulk_copy},
      {"remote_stores", remote_stores},
      {"groups_of_copies", groups_of_copies},
      {"largest_of_a_warp", largest_of_a_warp},
      {"conversions", conversions},
      {"arithmetic", arithmetic},
      {"deadlock", deadlock},
      {"shared_overflow", shared_overflow},
      {"alignment", alignment},
      {"last_block", last_block},
      {"stack_overflow", stack_overflow},
      {"speed", speed},
  };
  return run_checks(checks, argc, argv);
}
