// Memory, streams and events of the device, and what Paddle calls when it loads the plugin. Nothing is asynchronous:
// whatever is asked for has happened when the call returns.
#include <cstdlib>
#include <initializer_list>

#include "soft_device.h"

namespace {

constexpr size_t kDevices = 4, kMemory = size_t(16) << 30;
thread_local int current_device = 0;

template <typename... Arguments>
C_Status nothing(Arguments...) {
  return C_SUCCESS;
}

C_Status set_device(const C_Device device) {
  current_device = device->id;
  return C_SUCCESS;
}

C_Status get_device(const C_Device device) {
  device->id = current_device;
  return C_SUCCESS;
}

C_Status get_count(size_t* count) {
  *count = kDevices;
  return C_SUCCESS;
}

C_Status get_list(size_t* devices) {
  for (size_t i = 0; i < kDevices; ++i) devices[i] = i;
  return C_SUCCESS;
}

C_Status allocate(const C_Device, void** memory, size_t size) {
  return posix_memalign(memory, 64, size ? size : 1) ? C_FAILED : C_SUCCESS;
}

C_Status deallocate(const C_Device, void* memory, size_t) {
  std::free(memory);
  return C_SUCCESS;
}

C_Status fill(const C_Device, void* memory, unsigned char value, size_t size) {
  std::memset(memory, value, size);
  return C_SUCCESS;
}

template <typename... Where>  // the devices and the stream
C_Status copy(Where..., void* to, const void* from, size_t size) {
  std::memcpy(to, from, size);
  return C_SUCCESS;
}

template <typename Handle>  // of a stream or an event, which are no more than that
C_Status create(const C_Device, Handle* handle) {
  *handle = reinterpret_cast<Handle>(new char);
  return C_SUCCESS;
}

template <typename Handle>
C_Status destroy(const C_Device, Handle handle) {
  delete reinterpret_cast<char*>(handle);
  return C_SUCCESS;
}

C_Status call_back(C_Device device, C_Stream stream, C_Callback function, void* data) {
  C_Status status = C_SUCCESS;
  function(device, stream, data, &status);
  return status;
}

C_Status memory_stats(const C_Device, size_t* total, size_t* free) {
  *total = *free = kMemory;
  return C_SUCCESS;
}

C_Status min_chunk(const C_Device, size_t* size) {
  *size = 64;
  return C_SUCCESS;
}

C_Status yes(const C_Device, bool* answer) {
  *answer = true;
  return C_SUCCESS;
}

// Paddle 2.6 has nobody to ask.
template <typename Interface>
auto answer_for_types(Interface* device, int) -> decltype(void(device->is_float16_supported)) {
  device->is_float16_supported = device->is_bfloat16_supported = yes;
}
template <typename Interface>
void answer_for_types(Interface*, long) {}

}  // namespace

extern "C" __attribute__((visibility("default"))) void InitPlugin(CustomRuntimeParams* params) {
  PADDLE_CUSTOM_RUNTIME_CHECK_VERSION(params);
  params->device_type = strdup(kDeviceType);
  params->sub_device_type = strdup("");
  C_DeviceInterface* device = params->interface;
  std::memset(static_cast<void*>(device), 0, sizeof *device);
  device->size = sizeof *device;
  device->initialize = device->finalize = nothing;
  device->init_device = device->deinit_device = device->synchronize_device = nothing;
  device->set_device = set_device;
  device->get_device = get_device;
  device->get_device_count = get_count;
  device->get_device_list = get_list;
  device->create_stream = create;
  device->destroy_stream = destroy;
  device->query_stream = device->synchronize_stream = nothing;
  device->stream_add_callback = call_back;
  device->create_event = create;
  device->destroy_event = destroy;
  device->record_event = nothing;
  device->query_event = device->synchronize_event = nothing;
  device->stream_wait_event = nothing;
  device->device_memory_allocate = device->host_memory_allocate = device->unified_memory_allocate = allocate;
  device->device_memory_deallocate = device->host_memory_deallocate = device->unified_memory_deallocate = deallocate;
  device->device_memory_set = fill;
  device->memory_copy_h2d = device->memory_copy_d2h = device->memory_copy_d2d = copy<const C_Device>;
  device->memory_copy_p2p = copy<const C_Device, const C_Device>;
  device->async_memory_copy_h2d = device->async_memory_copy_d2h = copy<const C_Device, C_Stream>;
  device->async_memory_copy_d2d = copy<const C_Device, C_Stream>;
  device->async_memory_copy_p2p = copy<const C_Device, const C_Device, C_Stream>;
  device->device_memory_stats = memory_stats;
  device->device_min_chunk_size = min_chunk;
  answer_for_types(device, 0);
  add_collectives(device);
  register_kernels();
}
