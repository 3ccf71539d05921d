// Offsets of rows beyond 2^31 elements, which no other test has the memory for.
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "kernels.h"

int main() {
  kdfast::RowLayout rows;  // (3, 70000, 50000), its strides those of a larger tensor that has been cut and transposed
  rows.dims = 3;
  const int64_t size[] = {3, 70000, 50000}, stride[] = {int64_t(1) << 41, 1031, (int64_t(1) << 33) + 8};
  for (int d = 0; d < rows.dims; ++d) rows.size[d] = size[d], rows.stride[d] = stride[d];
  int wrong = 0;
  for (const int64_t i : {int64_t(0), int64_t(2)})
    for (const int64_t j : {int64_t(0), int64_t(1), int64_t(69999)})
      for (const int64_t k : {int64_t(0), int64_t(1), int64_t(49999)}) {
        const int64_t row = (i * size[1] + j) * size[2] + k, expected = i * stride[0] + j * stride[1] + k * stride[2];
        if (rows.offset(row) == expected) continue;
        std::printf("row %lld: %lld, should be %lld\n", (long long)row, (long long)rows.offset(row), (long long)expected);
        ++wrong;
      }
  return wrong > 0;
}
