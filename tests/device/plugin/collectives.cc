// Collectives among processes of one machine. What they tell each other goes through a shared file, piece by piece: a
// slot that each rank shows to all, and a mailbox for every pair of ranks.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "soft_device.h"

namespace {

constexpr size_t kPiece = size_t(1) << 20, kIdBytes = 128, kPage = 4096;
constexpr auto kPatience = std::chrono::minutes(10);  // no process outlives the others for longer

template <typename Done>
void wait_until(Done done) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  for (int turn = 0; !done(); ++turn) {
    if (turn > 100) usleep(50);
    if (std::chrono::steady_clock::now() > end) throw std::runtime_error("soft_device: another rank does not answer");
  }
}

struct Meeting {  // at the start of the file, which begins as zeros
  std::atomic<uint32_t> arrived, turn;
};

struct Mailbox {
  std::atomic<uint32_t> full;
  alignas(kPage) char content[kPiece];
};

struct Comm {
  size_t rank, ranks;
  char* memory = nullptr;

  size_t bytes() const { return kPage + ranks * kPiece + ranks * ranks * sizeof(Mailbox); }
  char* slot(size_t rank) const { return memory + kPage + rank * kPiece; }
  Mailbox& mailbox(size_t from, size_t to) const {
    return reinterpret_cast<Mailbox*>(memory + kPage + ranks * kPiece)[from * ranks + to];
  }

  void meet() {  // nobody leaves before all have come
    auto& meeting = *reinterpret_cast<Meeting*>(memory);
    const uint32_t turn = meeting.turn;
    if (++meeting.arrived == ranks) {
      meeting.arrived = 0;
      ++meeting.turn;
    } else {
      wait_until([&] { return meeting.turn != turn; });
    }
  }
};

Comm& of(C_CCLComm comm) { return *reinterpret_cast<Comm*>(comm); }

// Calls `function` with a value of the type's kind and one of the kind in which it is added up.
template <typename Function>
C_Status with_type(C_DataType type, Function function) {
  switch (type) {
    case FLOAT16: function(Float16(0), 0.f); break;
    case BFLOAT16: function(Bfloat16(0), 0.f); break;
    case FLOAT32: function(0.f, 0.f); break;
    case FLOAT64: function(0., 0.); break;
    case BOOL:
    case UINT8: function(uint8_t(), uint8_t()); break;
    case INT8: function(int8_t(), int8_t()); break;
    case INT32: function(int32_t(), int32_t()); break;
    case INT64: function(int64_t(), int64_t()); break;
    default: return C_FAILED;
  }
  return C_SUCCESS;
}

size_t width_of(C_DataType type) {
  size_t width = 0;
  with_type(type, [&](auto value, auto) { width = sizeof value; });
  return width;
}

template <typename T>
T combine(C_CCLReduceOp op, T one, T other) {
  if (op == MAX) return std::max(one, other);
  if (op == MIN) return std::min(one, other);
  return op == PRODUCT ? one * other : one + other;
}

// Puts together what all ranks show, from number `first` of their slots on; low types are rounded once, at the end.
void reduce_shown(const Comm& comm, char* to, size_t count, size_t first, C_DataType type, C_CCLReduceOp op) {
  with_type(type, [&](auto narrow, auto wide) {
    using Narrow = decltype(narrow);
    using Wide = decltype(wide);
    for (size_t i = 0; i < count; ++i) {
      auto shown = [&](size_t rank) { return Wide(reinterpret_cast<Narrow*>(comm.slot(rank))[first + i]); };
      Wide value = shown(0);
      for (size_t rank = 1; rank < comm.ranks; ++rank) value = combine<Wide>(op, value, shown(rank));
      if (op == AVG) value /= Wide(comm.ranks);
      reinterpret_cast<Narrow*>(to)[i] = Narrow(value);
    }
  });
}

// Each rank shows its bytes, piece by piece; `take(offset, size)` looks at what all show.
template <typename Take>
void show(Comm& comm, const void* mine, size_t bytes, Take take) {
  for (size_t offset = 0; offset < bytes; offset += kPiece) {
    const size_t size = std::min(kPiece, bytes - offset);
    if (mine) std::memcpy(comm.slot(comm.rank), static_cast<const char*>(mine) + offset, size);
    comm.meet();
    take(offset, size);
    comm.meet();
  }
}

constexpr size_t kAll = ~size_t(0);

C_Status reduce(void* from, void* to, size_t count, C_DataType type, C_CCLReduceOp op, size_t root, C_CCLComm handle,
                C_Stream) {
  Comm& comm = of(handle);
  const size_t width = width_of(type);
  if (!width) return C_FAILED;
  show(comm, from, count * width, [&](size_t offset, size_t size) {
    if (root == kAll || root == comm.rank)
      reduce_shown(comm, static_cast<char*>(to) + offset, size / width, 0, type, op);
  });
  return C_SUCCESS;
}

C_Status all_reduce(void* from, void* to, size_t count, C_DataType type, C_CCLReduceOp op, C_CCLComm comm,
                    C_Stream stream) {
  return reduce(from, to, count, type, op, kAll, comm, stream);
}

C_Status reduce_scatter(void* from, void* to, size_t count, C_DataType type, C_CCLReduceOp op, C_CCLComm handle,
                        C_Stream) {  // `count` is that of a rank's share
  Comm& comm = of(handle);
  const size_t width = width_of(type), share = count * width, mine = comm.rank * share;
  if (!width) return C_FAILED;
  show(comm, from, share * comm.ranks, [&](size_t offset, size_t size) {
    const size_t begin = std::max(offset, mine), end = std::min(offset + size, mine + share);
    if (begin < end)
      reduce_shown(comm, static_cast<char*>(to) + begin - mine, (end - begin) / width, (begin - offset) / width, type,
                   op);
  });
  return C_SUCCESS;
}

C_Status broadcast(void* memory, size_t count, C_DataType type, size_t root, C_CCLComm handle, C_Stream) {
  Comm& comm = of(handle);
  show(comm, comm.rank == root ? memory : nullptr, count * width_of(type), [&](size_t offset, size_t size) {
    if (comm.rank != root) std::memcpy(static_cast<char*>(memory) + offset, comm.slot(root), size);
  });
  return C_SUCCESS;
}

C_Status all_gather(void* from, void* to, size_t count, C_DataType type, C_CCLComm handle, C_Stream) {
  Comm& comm = of(handle);
  const size_t bytes = count * width_of(type);
  show(comm, from, bytes, [&](size_t offset, size_t size) {
    for (size_t rank = 0; rank < comm.ranks; ++rank)
      std::memcpy(static_cast<char*>(to) + rank * bytes + offset, comm.slot(rank), size);
  });
  return C_SUCCESS;
}

// One side of a mailbox: waits until it is as wanted, copies a piece, and leaves it the other way.
template <typename Copy>
C_Status pass(Mailbox& box, uint32_t wanted, size_t bytes, Copy copy) {
  for (size_t offset = 0; offset < bytes; offset += kPiece) {
    wait_until([&] { return box.full == wanted; });
    copy(offset, std::min(kPiece, bytes - offset));
    box.full = !wanted;
  }
  return C_SUCCESS;
}

C_Status send(void* from, size_t count, C_DataType type, size_t to_rank, C_CCLComm handle, C_Stream) {
  Mailbox& box = of(handle).mailbox(of(handle).rank, to_rank);
  return pass(box, 0, count * width_of(type), [&](size_t offset, size_t size) {
    std::memcpy(box.content, static_cast<char*>(from) + offset, size);
  });
}

C_Status receive(void* to, size_t count, C_DataType type, size_t from_rank, C_CCLComm handle, C_Stream) {
  Mailbox& box = of(handle).mailbox(from_rank, of(handle).rank);
  return pass(box, 1, count * width_of(type), [&](size_t offset, size_t size) {
    std::memcpy(static_cast<char*>(to) + offset, box.content, size);
  });
}

C_Status id_size(size_t* size) {
  *size = kIdBytes;
  return C_SUCCESS;
}

C_Status new_id(C_CCLRootId* id) {  // the name of the file
  char* name = static_cast<char*>(id->data);
  std::memset(name, 0, kIdBytes);
  std::snprintf(name, kIdBytes, "/dev/shm/%s-XXXXXX", kDeviceType);
  const int file = mkstemp(name);
  if (file < 0) return C_FAILED;
  close(file);
  id->sz = kIdBytes;
  return C_SUCCESS;
}

C_Status init_rank(size_t ranks, C_CCLRootId* id, size_t rank, C_CCLComm* result) {
  auto* comm = new Comm{rank, ranks};
  const std::string name = static_cast<const char*>(id->data);
  const int file = open(name.c_str(), O_RDWR);
  if (file < 0 || ftruncate(file, comm->bytes())) return C_FAILED;
  void* memory = mmap(nullptr, comm->bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) return C_FAILED;
  comm->memory = static_cast<char*>(memory);
  comm->meet();
  if (rank == 0) unlink(name.c_str());
  *result = reinterpret_cast<C_CCLComm>(comm);
  return C_SUCCESS;
}

C_Status destroy(C_CCLComm handle) {
  munmap(of(handle).memory, of(handle).bytes());
  delete &of(handle);
  return C_SUCCESS;
}

C_Status get_name(C_CCLComm, char* name) {
  std::strcpy(name, kDeviceType);
  return C_SUCCESS;
}

// Paddle 2.6 asks for no name.
template <typename Interface>
auto add_name(Interface* device, int) -> decltype(void(device->xccl_get_comm_name)) {
  device->xccl_get_comm_name = get_name;
}
template <typename Interface>
void add_name(Interface*, long) {}

C_Status group() { return C_SUCCESS; }

}  // namespace

void add_collectives(C_DeviceInterface* device) {
  add_name(device, 0);
  device->xccl_get_unique_id_size = id_size;
  device->xccl_get_unique_id = new_id;
  device->xccl_comm_init_rank = init_rank;
  device->xccl_destroy_comm = destroy;
  device->xccl_all_reduce = all_reduce;
  device->xccl_reduce = reduce;
  device->xccl_broadcast = broadcast;
  device->xccl_all_gather = all_gather;
  device->xccl_reduce_scatter = reduce_scatter;
  device->xccl_send = send;
  device->xccl_recv = receive;
  device->xccl_group_start = device->xccl_group_end = group;
}
