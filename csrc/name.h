// The arguments of ops that are strings.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace fused_ops {

// What a kernel takes where the schema of its op has str. A std::string in its place is leaked by every call: the
// headers of PyTorch up to 2.13 make a second one that nobody deletes (PyTorch's issue 191340). And 48 bytes that stay
// between two large outputs keep malloc from using the room of both again.
struct Name : std::string {
  using std::string::string;
};

}  // namespace fused_ops

template <>
struct torch::stable::detail::ToImpl<fused_ops::Name> {
  static fused_ops::Name call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length;
    const char* data;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    const fused_ops::Name name(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return name;
  }
};
