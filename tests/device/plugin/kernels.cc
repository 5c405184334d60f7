// The device's kernels. Each is one of Paddle's for CPUs, called on the same memory; in float16 and bfloat16 it is the
// float32 one, between a widening of what goes in and a rounding of what comes out.
//
// One function serves them all, whatever their signature: a kernel takes a context, tensors in, attributes and tensors
// out. In the calling convention of Linux on x86-64 each of these is one word, in a register or on the stack, and Paddle
// says which word is what. Code made at load time enters that function with the kernel's number; see `make_doors`.
#if !defined(__x86_64__) || !defined(__linux__)
#error "the calling convention below is that of Linux on x86-64"
#endif

#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "paddle/phi/backends/context_pool.h"
#include "paddle/phi/core/custom_kernel.h"
#include "paddle/phi/core/dense_tensor.h"
#include "paddle/phi/core/kernel_context.h"
#include "paddle/phi/core/kernel_factory.h"
#include "paddle/phi/core/tensor_utils.h"
#include "soft_device.h"

namespace {

using phi::Allocation;
using phi::AttributeType;
using phi::DataType;
using phi::DenseTensor;
using Inputs = std::vector<const DenseTensor*>;
using Outputs = std::vector<DenseTensor*>;

bool is_low(DataType type) { return type == DataType::FLOAT16 || type == DataType::BFLOAT16; }

phi::DenseTensorMeta& meta_of(DenseTensor* tensor) { return *phi::DenseTensorUtils::GetMutableMeta(tensor); }

// ------------------------------------------------------------------------------- one memory, seen from two places

struct Alias : Allocation {
  std::shared_ptr<Allocation> real;
  Alias(std::shared_ptr<Allocation> real, const phi::Place& place)
      : Allocation(real->ptr(), real->size(), place), real(std::move(real)) {}
};

std::shared_ptr<Allocation> seen_from(const phi::Place& place, const std::shared_ptr<Allocation>& memory) {
  if (!memory || memory->place() == place) return memory;
  if (auto alias = std::dynamic_pointer_cast<Alias>(memory)) return seen_from(place, alias->real);
  return std::make_shared<Alias>(memory, place);
}

DenseTensor seen_from_host(const DenseTensor& tensor) {
  DenseTensor view;
  meta_of(&view) = tensor.meta();
  if (tensor.has_allocation()) view.ResetHolder(seen_from(phi::CPUPlace(), tensor.Holder()));
  return view;
}

// ------------------------------------------------------------------------------- rounding

template <typename To, typename From>
void convert(const void* from, void* to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) static_cast<To*>(to)[i] = To(static_cast<const From*>(from)[i]);
}

DenseTensor widened(const DenseTensor& low, const phi::DeviceContext& host) {
  DenseTensor wide;
  meta_of(&wide) = low.meta();
  meta_of(&wide).dtype = DataType::FLOAT32;
  if (!low.initialized()) return wide;
  if (!low.meta().is_contiguous()) throw std::runtime_error("soft_device: a kernel got a tensor with gaps");
  void* to = host.Alloc(&wide, DataType::FLOAT32);
  auto* convert_low = low.dtype() == DataType::FLOAT16 ? convert<float, Float16> : convert<float, Bfloat16>;
  convert_low(low.data(), to, low.numel());
  return wide;
}

void round_into(const DenseTensor& wide, DataType type, void* memory) {
  auto* convert_wide = type == DataType::FLOAT16 ? convert<Float16, float> : convert<Bfloat16, float>;
  convert_wide(wide.data(), memory, wide.numel());
}

// ------------------------------------------------------------------------------- a kernel and its tensors

struct Entry {
  std::string name;
  phi::Kernel host;  // the one that computes
  DataType type;     // under which the kernel is known
  bool lowered;      // whether it computes in float32 for a lower type
  std::atomic<long> calls{0};

  Entry(std::string name, const phi::Kernel& host, DataType type, bool lowered)
      : name(std::move(name)), host(host), type(type), lowered(lowered) {}
};

std::deque<Entry> entries;

// Outputs that a GPU keeps in float32 whatever the type of the others (in Paddle's registrations of kernels for GPUs).
const std::unordered_map<std::string, std::unordered_set<int>> kWideOutputs = {{"layer_norm", {1, 2}},
                                                                                {"group_norm", {1, 2}},
                                                                                {"instance_norm", {1, 2}},
                                                                                {"batch_norm", {1, 2, 3, 4}},
                                                                                {"rms_norm", {1}}};

// Kernels that are about the type itself, or about bytes: the host's own for low types.
const std::unordered_set<std::string> kOfBytes = {"contiguous", "strided_copy", "shape",      "shape64",    "numel",
                                                  "is_empty",   "memcpy",       "memcpy_d2h", "memcpy_h2d", "view_dtype"};

// The host's views of a call's tensors.
class Views {
 public:
  const phi::DeviceContext* host = phi::DeviceContextPool::Instance().Get(phi::CPUPlace());

  Views(Entry& entry, const phi::DeviceContext* device) : entry_(entry), device_(device) { ++entry.calls; }

  const DenseTensor* in(const DenseTensor* tensor) {
    if (!tensor) return nullptr;
    DenseTensor view = seen_from_host(*tensor);
    inputs_.push_back(entry_.lowered && is_low(tensor->dtype()) ? widened(view, *host) : view);
    return &inputs_.back();
  }

  Inputs in(const Inputs& tensors) {
    Inputs views;
    for (auto* tensor : tensors) views.push_back(in(tensor));
    return views;
  }

  DenseTensor* out(DenseTensor* tensor, int index) {
    if (!tensor) return nullptr;
    outputs_.push_back({tensor, DenseTensor(), tensor->dtype(), index});
    DenseTensor& view = outputs_.back().view;
    if (entry_.lowered && is_low(tensor->dtype())) {
      meta_of(&view) = tensor->meta();
      meta_of(&view).dtype = DataType::FLOAT32;
    } else {
      view = seen_from_host(*tensor);
    }
    return &view;
  }

  Outputs out(const Outputs& tensors, int index) {
    Outputs views;
    for (auto* tensor : tensors) views.push_back(out(tensor, index));
    return views;
  }

  DenseTensor* output(int index) {
    for (auto& output : outputs_)
      if (output.index == index) return &output.view;
    return nullptr;
  }

  // After the kernel: give the device's tensors what the host's hold.
  void finish() {
    const auto wide = kWideOutputs.find(entry_.name);
    for (auto& [tensor, view, type, index] : outputs_) {
      if (!view.has_allocation()) continue;
      const bool stays_wide = wide != kWideOutputs.end() && wide->second.count(index);
      const bool rounds = entry_.lowered && is_low(type) && view.dtype() == DataType::FLOAT32 && !stays_wide;
      const size_t offset = tensor->meta().offset;
      meta_of(tensor) = view.meta();
      if (rounds) {
        meta_of(tensor).dtype = type;
        meta_of(tensor).offset = offset;  // where a part of a larger tensor is written in place
        void* memory = device_->Alloc(tensor, type);
        if (view.initialized()) round_into(view, type, memory);
      } else {
        tensor->ResetHolder(seen_from(device_->GetPlace(), view.Holder()));
      }
    }
  }

 private:
  struct Output {
    DenseTensor* tensor;
    DenseTensor view;
    DataType type;
    int index;
  };
  Entry& entry_;
  const phi::DeviceContext* device_;
  std::deque<DenseTensor> inputs_;
  std::deque<Output> outputs_;
};

// ------------------------------------------------------------------------------- called as a function

constexpr int kInts = 6, kReals = 8, kStack = 48;  // words in registers; words on the stack, at most

struct Registers {
  double reals[kReals];
  long ints[kInts];
};

// The words of a call in the order of its parameters, to read and to replace.
class Words {
 public:
  Words(const Registers& registers, const long* stack) : registers_(registers), came_(stack) {}

  long& next() { return ints_ < kInts ? registers_.ints[ints_++] : spilled(); }
  void skip_real() { reals_ < kReals ? void(++reals_) : void(spilled()); }
  void call(void* function) { call(function, std::make_index_sequence<kStack>()); }

 private:
  long& spilled() {
    if (spilled_ == kStack) throw std::runtime_error("soft_device: a kernel with too many parameters");
    stack_[spilled_] = came_[spilled_];
    return stack_[spilled_++];
  }

  template <size_t... I>
  void call(void* function, std::index_sequence<I...>) {
    using Function = void (*)(long, long, long, long, long, long, double, double, double, double, double, double,
                              double, double, decltype(long(I))...);
    auto& [reals, ints] = registers_;
    reinterpret_cast<Function>(function)(ints[0], ints[1], ints[2], ints[3], ints[4], ints[5], reals[0], reals[1],
                                         reals[2], reals[3], reals[4], reals[5], reals[6], reals[7], stack_[I]...);
  }

  Registers registers_;
  const long* came_;
  long stack_[kStack] = {};
  int ints_ = 0, reals_ = 0, spilled_ = 0;
};

template <typename T>
const T& at(long word) {
  return *reinterpret_cast<const T*>(word);
}

template <typename T>
long word_of(const T* pointer) {
  return reinterpret_cast<long>(pointer);
}

template <typename T, typename Argument>
bool is(const Argument& argument) {
  return argument.type_index == std::type_index(typeid(T));
}

// Adam and AdamW. The host's kernels know no master weights: they get those for the weights, and the weights are what
// rounding leaves of the new ones. Gradients are widened where they are low, and taken as they are in float32.
class Masters {
 public:
  Masters(const Entry& entry, const std::vector<long*>& inputs) {
    if (!entry.lowered || (entry.name != "adam" && entry.name != "adamw")) return;
    // The last but one of the inputs, and the last of the outputs; the last input is `skip_update`.
    auto& master = at<paddle::optional<DenseTensor>>(*inputs[inputs.size() - 2]);
    if (!master) return;
    output_ = entry.host.args_def().output_defs().size() - 1;
    *inputs[0] = word_of(&*master);
  }

  void keep(Views& views) const {
    if (output_ < 0) return;
    const DenseTensor& updated = *views.output(0);
    std::memcpy(views.output(output_)->data(), updated.data(), updated.numel() * sizeof(float));
  }

 private:
  int output_ = -1;
};

void run(Entry& entry, const Registers& registers, const long* stack) {
  Words words(registers, stack);
  long& context = words.next();
  Views views(entry, &at<phi::DeviceContext>(context));
  context = word_of(views.host);
  std::deque<paddle::optional<DenseTensor>> optionals;  // what the words point to
  std::deque<Inputs> vectors;
  std::deque<paddle::optional<Inputs>> optional_vectors;
  std::deque<Outputs> output_vectors;
  std::vector<long*> inputs;

  const auto& parameters = entry.host.args_def();
  for (auto& input : parameters.input_defs()) {
    long& word = words.next();
    inputs.push_back(&word);
    if (is<DenseTensor>(input)) {
      word = word_of(views.in(&at<DenseTensor>(word)));
    } else if (is<Inputs>(input)) {
      word = word_of(&vectors.emplace_back(views.in(at<Inputs>(word))));
    } else if (is<paddle::optional<DenseTensor>>(input)) {
      if (auto& tensor = at<paddle::optional<DenseTensor>>(word))
        word = word_of(&optionals.emplace_back(*views.in(&*tensor)));
    } else if (auto& tensors = at<paddle::optional<Inputs>>(word)) {
      word = word_of(&optional_vectors.emplace_back(views.in(*tensors)));
    }
  }
  for (auto& attribute : parameters.attribute_defs()) {
    if (attribute.type_index == AttributeType::FLOAT32 || attribute.type_index == AttributeType::FLOAT64) {
      words.skip_real();
      continue;
    }
    long& word = words.next();
    if (attribute.type_index == AttributeType::DATA_TYPE && entry.lowered && is_low(DataType(word & 0xff)))
      word = long(DataType::FLOAT32);
  }
  int index = 0;
  for (auto& output : parameters.output_defs()) {
    long& word = words.next();
    if (is<DenseTensor*>(output))
      word = word_of(views.out(reinterpret_cast<DenseTensor*>(word), index));
    else  // a vector by value: the caller's copy of it
      word = word_of(&output_vectors.emplace_back(views.out(at<Outputs>(word), index)));
    ++index;
  }

  Masters masters(entry, inputs);
  words.call(entry.host.GetVariadicKernelFn<void*>());
  masters.keep(views);
  views.finish();
}

extern "C" __attribute__((used, visibility("hidden"))) void soft_device_run(Entry* entry, const Registers* registers,
                                                                            const long* stack) {
  run(*entry, *registers, stack);
}

// Where all kernels are entered, their number in r10: puts the registers that hold arguments into a `Registers`.
extern "C" void soft_device_enter();
asm(R"(
.text
.type soft_device_enter, @function
soft_device_enter:
  .cfi_startproc
  push %rbp
  .cfi_def_cfa_offset 16
  .cfi_offset %rbp, -16
  mov %rsp, %rbp
  .cfi_def_cfa_register %rbp
  push %r9
  push %r8
  push %rcx
  push %rdx
  push %rsi
  push %rdi
  sub $64, %rsp
  movsd %xmm0, (%rsp)
  movsd %xmm1, 8(%rsp)
  movsd %xmm2, 16(%rsp)
  movsd %xmm3, 24(%rsp)
  movsd %xmm4, 32(%rsp)
  movsd %xmm5, 40(%rsp)
  movsd %xmm6, 48(%rsp)
  movsd %xmm7, 56(%rsp)
  mov %r10, %rdi
  mov %rsp, %rsi
  lea 16(%rbp), %rdx
  call soft_device_run
  leave
  .cfi_def_cfa %rsp, 8
  ret
  .cfi_endproc
.size soft_device_enter, .-soft_device_enter
)");

// One entrance per kernel: `mov $entry, %r10; mov $soft_device_enter, %r11; jmp *%r11`.
std::vector<void*> make_doors(const std::deque<Entry>& entries) {
  constexpr size_t kDoor = 32;
  const size_t bytes = entries.size() * kDoor;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("soft_device: no memory for its entrances");
  std::vector<void*> doors;
  for (auto& entry : entries) {
    auto* door = static_cast<unsigned char*>(memory) + doors.size() * kDoor;
    doors.push_back(door);
    const Entry* first = &entry;
    auto* second = &soft_device_enter;
    std::memcpy(door, "\x49\xba", 2), std::memcpy(door + 2, &first, 8);
    std::memcpy(door + 10, "\x49\xbb", 2), std::memcpy(door + 12, &second, 8);
    std::memcpy(door + 20, "\x41\xff\xe3", 3);
  }
  if (mprotect(memory, bytes, PROT_READ | PROT_EXEC)) throw std::runtime_error("soft_device: no right to make code");
  return doors;
}

// ------------------------------------------------------------------------------- called with a context that holds all

template <typename Context>
auto input_at(Context* call, size_t at, int) -> decltype(call->MutableInputAt(at)) {
  return call->MutableInputAt(at);
}
template <typename Context>  // Paddle 2.6 gives a reference, also to what is not there
const phi::TensorBase* input_at(Context* call, size_t at, long) {
  return &call->template InputAt<DenseTensor>(at);
}

// `_legacy_C_ops` and static graphs do so.
void run(Entry& entry, phi::KernelContext* call) {
  Views views(entry, &call->GetDeviceContext<phi::DeviceContext>());
  phi::KernelContext context(const_cast<phi::DeviceContext*>(views.host));
  const auto& parameters = entry.host.args_def();
  auto input = [&](size_t at) { return views.in(static_cast<const DenseTensor*>(input_at(call, at, 0))); };
  for (size_t i = 0; i < parameters.input_defs().size(); ++i) {
    const auto& definition = parameters.input_defs()[i];
    const auto [begin, end] = call->InputRangeAt(i);
    if (is<DenseTensor>(definition) || is<paddle::optional<DenseTensor>>(definition)) {
      context.EmplaceBackInput(input(begin));
    } else {
      paddle::small_vector<const phi::TensorBase*> tensors;
      for (int j = begin; j < end; ++j) tensors.push_back(input(j));
      context.EmplaceBackInputs(tensors);
    }
  }
  for (size_t i = 0; i < parameters.attribute_defs().size(); ++i) {
    auto attribute = call->AttrAt(i);
    if (auto* type = paddle::get_if<DataType>(&attribute); type && entry.lowered && is_low(*type))
      attribute = DataType::FLOAT32;
    context.EmplaceBackAttr(attribute);
  }
  for (size_t i = 0; i < parameters.output_defs().size(); ++i) {
    const auto [begin, end] = call->OutputRangeAt(i);
    if (is<DenseTensor*>(parameters.output_defs()[i])) {
      context.EmplaceBackOutput(views.out(call->MutableOutputAt<DenseTensor>(begin), i));
    } else {
      paddle::small_vector<phi::TensorBase*> tensors;
      for (int j = begin; j < end; ++j) tensors.push_back(views.out(call->MutableOutputAt<DenseTensor>(j), i));
      context.EmplaceBackOutputs(tensors);
    }
  }
  if (entry.lowered && entry.name.rfind("adam", 0) == 0)
    throw std::runtime_error("soft_device: Adam with low weights is made for dynamic graphs only");
  entry.host(&context);
  views.finish();
}

// ------------------------------------------------------------------------------- which kernels there are

bool is_served(const phi::Kernel& kernel) {
  if (!kernel.GetVariadicKernelFn<void*>()) return false;
  for (auto& input : kernel.args_def().input_defs())
    if (!is<DenseTensor>(input) && !is<paddle::optional<DenseTensor>>(input) && !is<Inputs>(input) &&
        !is<paddle::optional<Inputs>>(input))
      return false;
  for (auto& output : kernel.args_def().output_defs())
    if (!is<DenseTensor*>(output) && !is<Outputs>(output)) return false;
  return true;
}

void collect(const std::string& name, const phi::KernelKeyMap& kernels) {
  const phi::Kernel* single = nullptr;
  std::vector<std::pair<DataType, const phi::Kernel*>> served;
  for (auto& [key, kernel] : kernels) {
    if (key.backend() != phi::Backend::CPU || key.layout() != phi::DataLayout::ALL_LAYOUT || !is_served(kernel)) continue;
    served.emplace_back(key.dtype(), &kernel);
    if (key.dtype() == DataType::FLOAT32) single = &kernel;
  }
  const bool lowers = single && !kOfBytes.count(name);
  for (auto& [type, kernel] : served) {
    const bool casts = name == "cast" && type == DataType::FLOAT32;  // the host's way to float16 is not everywhere exact
    if (!(lowers && is_low(type))) entries.emplace_back(name, *kernel, type, casts);
  }
  if (lowers)
    for (auto type : {DataType::FLOAT16, DataType::BFLOAT16}) entries.emplace_back(name, *single, type, true);
}

}  // namespace

void register_kernels() {
  for (auto& [name, kernels] : phi::KernelFactory::Instance().kernels()) collect(name, kernels);
  const auto backend = paddle::experimental::StringToBackend(kDeviceType);
  const auto doors = make_doors(entries);
  for (size_t i = 0; i < entries.size(); ++i) {
    Entry& entry = entries[i];
    phi::Kernel kernel([&entry](phi::KernelContext* call) { run(entry, call); }, doors[i]);
    *kernel.mutable_args_def() = entry.host.args_def();
    for (auto& input : kernel.mutable_args_def()->input_defs()) input.SetBackend(backend);
    for (auto& output : kernel.mutable_args_def()->output_defs()) output.SetBackend(backend);
    const phi::KernelKey key(backend, phi::DataLayout::ALL_LAYOUT, entry.type);
    phi::CustomKernelMap::Instance().RegisterCustomKernel(entry.name, key, kernel);
  }
}

// For tests: writes a line "name type rounded|native calls" for each kernel that has run since the last time.
extern "C" __attribute__((visibility("default"))) void soft_device_write_calls(const char* file) {
  FILE* out = std::fopen(file, "w");
  if (!out) return;
  for (auto& entry : entries)
    if (const long calls = entry.calls.exchange(0))
      std::fprintf(out, "%s %s %s %ld\n", entry.name.c_str(), phi::DataTypeToString(entry.type).c_str(),
                   entry.lowered ? "rounded" : "native", calls);
  std::fclose(out);
}
