// Checks of csrc/cuda/runtime.cpp on the runtime of tests/emulator/runtime: `check_runtime NAME` runs one and
// prints what went wrong.
#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <string>

#include "checks.h"
#include "cuda/common.h"
#include "cuda_runtime_api.h"

using namespace kdkernels::cuda;

const void* kdkernels::cuda::probe_kernel() { return &fake; }

namespace {

void demand_error(const std::function<void()>& run, const std::string& part) {
  std::string message;
  try {
    run();
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  demand(message.find(part) != std::string::npos, "no '" + part + "' in '" + message + "'");
  demand(fake.last == cudaSuccess, "an error is left for the next who asks");
}

void current_device_stays() {
  for (const int before : {0, 1}) {
    fake.current = before;
    for (int index = 0; index < 3; ++index) {
      describe_device(index);
      demand(fake.current == before, "another device is current");
    }
    for (const char* name : {"cudaDeviceGetAttribute", "cudaFuncGetAttributes"}) {
      fake.failing = {name};
      for (int index = 0; index < 3; ++index)
        demand_error([&] { describe_device(index); }, std::string(name) + " failed: a fake error");
      demand(fake.current == before, "another device is current after an error");
    }
    fake.failing.clear();
    demand_error([&] { describe_device(7); }, "cudaSetDevice failed");
    demand(fake.current == before, "another device is current after a device that is not there");
  }
}

void only_that_device_is_woken() {
  describe_device(0);
  demand(fake.contexts == std::set<int>{0}, "a context beside that of the device");
}

void facts_of_a_device() {
  Device device = describe_device(0);
  demand(device.arch == 90 && device.multiprocessors == 132 && device.block_shared == 232448 &&
             device.most_cluster == 16 && device.clusters[3] == 8,
         "facts");
  device = describe_device(1);
  demand(device.arch == 80 && device.most_cluster == 0 && device.clusters[0] == -1, "of sm_80");
  fake.ptx = 80;
  demand(describe_device(0).arch == 80, "translated code has clusters");
  fake.ptx = 90;
  fake.failing = {"cudaOccupancyMaxPotentialClusterSize"};
  device = describe_device(0);
  demand(device.most_cluster == 0 && device.clusters[0] == 0, "clusters that nobody knows of");
  demand(fake.last == cudaSuccess, "an error is left");
}

void driver() {
  demand(driver_version() == 13000, "version");
  fake.driver = 12080;
  demand(driver_version() == 12080, "version");
  fake.failing = {"cudaDriverGetVersion"};
  demand(driver_version() == 0, "version of no driver");
  demand(fake.last == cudaSuccess && fake.contexts.empty(), "an error, or a context");
}

void a_ticket_for_each_stream() {
  std::set<unsigned*> found;
  std::map<std::pair<int, int>, unsigned*> first;
  FakeStream streams[300];
  for (int turn = 0; turn < 2; ++turn)
    for (int device = 0; device < 2; ++device)
      for (int i = 0; i < 300; ++i) {
        streams[i].id = unsigned(i);
        unsigned* const ticket = stream_ticket(device, &streams[i]);
        demand(ticket != nullptr, "no ticket");
        unsigned*& before = first[{device, i}];
        if (turn) demand(ticket == before, "a stream has two tickets");
        before = ticket;
        found.insert(ticket);
        demand(*ticket == 0 && fake.cleared[ticket] == &streams[i], "not cleared by its stream");
      }
  demand(found.size() == 600, "two streams share a ticket");
  demand(fake.allocations <= 6 && fake.cleared.size() == 600, "memory taken, or cleared, again");
  // The next stream at the address of one that is gone.
  streams[0].id = 1000;
  demand(!found.count(stream_ticket(0, &streams[0])), "the ticket of a stream that is gone");
}

void a_captured_stream_has_none() {
  FakeStream stream{5, true};
  demand(stream_ticket(0, &stream) == nullptr, "a ticket in a graph");
  stream.captured = false;
  demand(stream_ticket(0, &stream) != nullptr, "no ticket");
  stream.captured = true;
  demand(stream_ticket(0, &stream) == nullptr, "a ticket in a graph");
}

void memory_is_taken_beside_a_capture() {
  FakeStream stream{5};
  stream_ticket(0, &stream);
  demand(fake.modes_of_malloc == std::vector<cudaStreamCaptureMode>{cudaStreamCaptureModeRelaxed},
         "memory taken in the mode of a capture");
  demand(fake.mode == cudaStreamCaptureModeGlobal, "the mode was not put back");
}

void no_ticket_is_no_error() {
  FakeStream stream{5};
  for (const char* name :
       {"cudaStreamIsCapturing", "cudaStreamGetId", "cudaMalloc", "cudaMemsetAsync"}) {
    fake.failing = {name};
    demand(stream_ticket(0, &stream) == nullptr, std::string("a ticket in spite of ") + name);
    demand(fake.last == cudaSuccess, "an error is left");
  }
  fake.failing.clear();
  demand(stream_ticket(0, &stream) != nullptr && *stream_ticket(0, &stream) == 0, "none later");
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, void (*)()> checks = {
      {"current_device_stays", current_device_stays},
      {"only_that_device_is_woken", only_that_device_is_woken},
      {"facts_of_a_device", facts_of_a_device},
      {"driver", driver},
      {"a_ticket_for_each_stream", a_ticket_for_each_stream},
      {"a_captured_stream_has_none", a_captured_stream_has_none},
      {"memory_is_taken_beside_a_capture", memory_is_taken_beside_a_capture},
      {"no_ticket_is_no_error", no_ticket_is_no_error},
  };
  return run_checks(checks, argc, argv);
}
