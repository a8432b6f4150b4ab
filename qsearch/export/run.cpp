// Run and check a bundle from C++, with nothing but TVM's runtime.
//
//   DIR/run             replay the recorded pictures, compare bit for bit, time the module; prints one JSON document
//
// latency_ms is that of as many images as the module takes at a time, `batch`.
//
// Build it where Python has apache-tvm (its wheels bring headers and libraries; nothing of Python is needed to run it):
//
//   F=$(python -c 'import importlib.util as u; print(u.find_spec("tvm_ffi").submodule_search_locations[0])')
//   T=$(python -c 'import importlib.util as u; print(u.find_spec("tvm").submodule_search_locations[0])')
//   g++ -O2 -std=c++17 run.cpp -o run -I$F/include -Wl,--no-as-needed,-rpath,$F/lib:$T/lib -L$F/lib -L$T/lib -ltvm_ffi -ltvm_runtime
//
// It does not check the files' SHA-256: run.py does. A module for several threads wants an idle machine.
// Exit status: 0 good; 1 cannot be run, or does not replay.

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

struct Array {
  std::string dtype;  // as NumPy writes it: |u1, <f4, <i4
  std::vector<int64_t> shape;
  std::vector<char> bytes;

  int64_t row_bytes() const { return static_cast<int64_t>(bytes.size()) / shape[0]; }
};

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// What follows "key": in JSON; enough for numbers, lists of numbers and words of the files of a bundle.
std::string after_key(const std::string& json, const std::string& key) {
  size_t at = json.find("\"" + key + "\":");
  if (at == std::string::npos) throw std::runtime_error("no " + key + " in the bundle's JSON");
  return json.substr(at + key.size() + 3);
}

std::vector<float> floats(const std::string& json, const std::string& key) {
  std::string text = after_key(json, key);
  const char* place = text.c_str() + text.find('[') + 1;
  std::vector<float> found;
  for (char* end;; place = end + std::strspn(end, ", \n\r\t")) {
    double value = std::strtod(place, &end);
    if (end == place) return found;
    found.push_back(static_cast<float>(value));
  }
}

// An array that NumPy saved, in C order.
Array read_npy(const std::string& path) {
  std::string content = read_file(path);
  if (content.size() < 12 || content.compare(0, 6, "\x93NUMPY") != 0) throw std::runtime_error(path + " is no .npy file");
  auto byte = [&](size_t i) { return static_cast<size_t>(static_cast<unsigned char>(content[i])); };
  bool first = content[6] == 1;
  size_t start = first ? 10 : 12, size = byte(8) | byte(9) << 8;
  if (!first) size |= byte(10) << 16 | byte(11) << 24;
  std::string header = content.substr(start, size);
  Array array;
  array.dtype = header.substr(header.find("'descr'") + 7);
  array.dtype = array.dtype.substr(array.dtype.find('\'') + 1, 3);
  if (header.find("'fortran_order': False") == std::string::npos) throw std::runtime_error(path + " is not in C order");
  const char* place = header.c_str() + header.find('(') + 1;
  for (char* end;; place = end + std::strspn(end, ", ")) {
    int64_t extent = std::strtoll(place, &end, 10);
    if (end == place) break;
    array.shape.push_back(extent);
  }
  array.bytes.assign(content.begin() + start + size, content.end());
  return array;
}

// What run.py makes of each stored picture, uint8 (N, H, W, C): as it is, mirrored, upside down, both; then those of its negative.
Array varied(const Array& pictures) {
  int64_t rows = pictures.shape[0] * pictures.shape[1], width = pictures.shape[2], channels = pictures.shape[3];
  int64_t size = pictures.row_bytes(), height = rows / pictures.shape[0];
  Array all{pictures.dtype, pictures.shape, std::vector<char>(8 * pictures.bytes.size())};
  all.shape[0] *= 8;
  for (int64_t n = 0; n < pictures.shape[0]; ++n)
    for (int64_t kind = 0; kind < 8; ++kind)
      for (int64_t y = 0; y < height; ++y)
        for (int64_t x = 0; x < width; ++x)
          for (int64_t c = 0; c < channels; ++c) {
            int64_t row = kind & 2 ? height - 1 - y : y, column = kind & 1 ? width - 1 - x : x;
            unsigned char value = pictures.bytes[n * size + (row * width + column) * channels + c];
            all.bytes[(8 * n + kind) * size + (y * width + x) * channels + c] = kind & 4 ? 255 - value : value;
          }
  return all;
}

// uint8 (N, H, W, C) -> float32 (N, C, H, W): in float32 as run.py does it, operation by operation.
Array normalised(const Array& pictures, const std::string& preprocessing) {
  std::vector<float> mean = floats(preprocessing, "mean"), deviation = floats(preprocessing, "std");
  int64_t count = pictures.shape[0], height = pictures.shape[1], width = pictures.shape[2], channels = pictures.shape[3];
  Array made{"<f4", {count, channels, height, width}, std::vector<char>(4 * pictures.bytes.size())};
  float* out = reinterpret_cast<float*>(made.bytes.data());
  for (int64_t n = 0; n < count; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < height * width; ++i) {
        volatile float share = static_cast<unsigned char>(pictures.bytes[(n * height * width + i) * channels + c]) / 255.0f;
        volatile float centred = share - mean[c];
        *out++ = centred / deviation[c];
      }
  return made;
}

struct Aligned {
  void AllocData(DLTensor* tensor) {
    size_t size = (ffi::GetDataSize(*tensor) + 63) / 64 * 64;
    tensor->data = std::aligned_alloc(64, size ? size : 64);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

// As many images from the n-th on as the module takes at a time; from the n-th again where there are fewer, as run.py has it.
ffi::Tensor batch_of(const Array& array, int64_t n, int64_t batch) {
  DLDataType dtype{static_cast<uint8_t>(array.dtype[1] == 'f' ? kDLFloat : kDLUInt), 8, 1};
  dtype.bits = static_cast<uint8_t>(8 * (array.dtype[2] - '0'));
  std::vector<int64_t> shape = array.shape;
  int64_t left = shape[0] - n, size = array.row_bytes();
  shape[0] = batch;
  ffi::Tensor made = ffi::Tensor::FromNDAlloc(Aligned(), ffi::ShapeView(shape.data(), shape.size()), dtype, DLDevice{kDLCPU, 0});
  for (int64_t i = 0; i < batch; ++i)
    std::memcpy(static_cast<char*>(made.data_ptr()) + i * size, array.bytes.data() + (n + i % left) * size, size);
  return made;
}

double seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// The process's largest resident memory, bytes; that of this program, not of the one that started it.
long peak_bytes() {
  std::string text = read_file("/proc/self/status");
  return 1024 * std::strtol(text.c_str() + text.find("VmHWM:") + 6, nullptr, 10);
}

double percentile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  double place = share * (values.size() - 1);
  size_t low = static_cast<size_t>(place), high = std::min(low + 1, values.size() - 1);
  return values[low] + (place - low) * (values[high] - values[low]);
}

int run(const std::string& bundle) {
  std::string manifest = read_file(bundle + "/manifest.json"), preprocessing = read_file(bundle + "/preprocessing.json");
  int threads = std::atoi(after_key(manifest, "threads").c_str());
  // Both are read when the first kernel shares its work; bound threads do worse where they meet another process.
  setenv("TVM_NUM_THREADS", std::to_string(threads).c_str(), 1);
  setenv("TVM_BIND_THREADS", "0", 0);

  ffi::Module library = ffi::Module::LoadFromFile(bundle + "/model.so");
  ffi::Module machine = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  const int pooled = 2;  // allocator of the virtual machine
  machine->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, pooled);
  ffi::Function main = machine->GetFunction("main").value();

  Array inputs = read_npy(bundle + "/recorded_inputs.npy"), expected = read_npy(bundle + "/recorded_outputs.npy");
  if (inputs.dtype == "|u1") inputs = varied(inputs);
  bool takes_pixels = after_key(manifest, "dtype").find("uint8") < 3;
  if (inputs.dtype == "|u1" && !takes_pixels) inputs = normalised(inputs, preprocessing);
  if (inputs.shape[0] != expected.shape[0]) throw std::runtime_error("recorded inputs and outputs differ in number");
  int64_t batch = static_cast<int64_t>(floats(manifest, "shape").at(0));

  int64_t different = 0, count = inputs.shape[0], size = expected.row_bytes();
  double start = seconds(CLOCK_MONOTONIC);
  for (int64_t n = 0; n < count; n += batch) {
    ffi::Tensor output = main(batch_of(inputs, n, batch)).cast<ffi::Tensor>();
    if (static_cast<int64_t>(ffi::GetDataSize(output)) != batch * size)
      throw std::runtime_error("the module gives another number of outputs than were recorded");
    const char* given = static_cast<const char*>(output.data_ptr());
    for (int64_t i = 0; i < std::min(batch, count - n) * size; ++i)
      different += __builtin_popcount(static_cast<unsigned char>(given[i] ^ expected.bytes[n * size + i]));
  }
  double loop_s = seconds(CLOCK_MONOTONIC) - start;

  // One batch: 21 repeats of about 5 ms. A module for one thread by that thread's own clock, as run.py does it.
  clockid_t clock = threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
  ffi::Tensor images = batch_of(inputs, 0, batch);
  start = seconds(clock);
  for (int i = 0; i < 5; ++i) main(images);
  int number = std::max(1, static_cast<int>(std::lround(0.005 / std::max((seconds(clock) - start) / 5, 1e-7))));
  std::vector<double> times;
  for (int repeat = 0; repeat < 21; ++repeat) {
    start = seconds(clock);
    for (int i = 0; i < number; ++i) main(images);
    times.push_back(1e3 * (seconds(clock) - start) / number);
  }
  std::printf(
      "{\"images\": %lld, \"batch\": %lld, \"mismatching_bits\": %lld, \"latency_ms\": %.6f, \"latency_spread_ms\": %.6f, "
      "\"threads\": %d, \"loop_images_per_s\": %.1f, \"peak_rss_bytes\": %ld}\n",
      static_cast<long long>(count), static_cast<long long>(batch), static_cast<long long>(different), percentile(times, 0.5),
      (percentile(times, 0.75) - percentile(times, 0.25)) / 2, threads, count / loop_s, peak_bytes());
  return different ? 1 : 0;
}

int main(int argc, char** argv) {
  std::string own = argv[0];
  std::string beside = own.find('/') == std::string::npos ? "." : own.substr(0, own.rfind('/'));
  try {
    return run(argc > 1 ? argv[1] : beside);
  } catch (const ffi::Error& error) {
    std::cerr << "problem: " << error.message() << std::endl;
  } catch (const std::exception& error) {
    std::cerr << "problem: " << error.what() << std::endl;
  }
  return 1;
}
