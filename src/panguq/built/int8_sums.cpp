// int8 codes of few tokens times an int8 weight [n, k], which is read once, four rows at a time.
// For x86 processors with AVX512 and VNNI.
#include <immintrin.h>

#include <cstdint>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace {

constexpr int kRows = 4;
constexpr int64_t kLeast = 1 << 15;  // weights below which threads cost more than they save

// sums[r] = sum_i (x[i] - 128) * weight[r, i], exact, for `rows` rows from `weight` on. The
// instruction takes one factor without a sign, so 128 times the row's own sum comes off.
template <int rows>
void products(const uint8_t* x, const int8_t* weight, int32_t* sums, int64_t k) {
  __m512i total[rows], own[rows];
  for (int r = 0; r < rows; ++r) total[r] = own[r] = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < k; i += 64) {
    const int64_t left = k - i;
    const __mmask64 mask = left >= 64 ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
    const __m512i codes = _mm512_maskz_loadu_epi8(mask, x + i);
    for (int r = 0; r < rows; ++r) {
      const __m512i row = _mm512_maskz_loadu_epi8(mask, weight + r * k + i);
      total[r] = _mm512_dpbusd_epi32(total[r], codes, row);
      own[r] = _mm512_dpbusd_epi32(own[r], ones, row);
    }
  }
  for (int r = 0; r < rows; ++r) {
    sums[r] = _mm512_reduce_add_epi32(_mm512_sub_epi32(total[r], _mm512_slli_epi32(own[r], 7)));
  }
}

bool lies_row_by_row(AtenTensorHandle tensor, int64_t rows, int64_t columns) {
  int64_t* strides = nullptr;
  return !aoti_torch_get_strides(tensor, &strides) && (columns < 2 || strides[1] == 1) &&
         (rows < 2 || strides[0] == columns);
}

}  // namespace

extern "C" {

// sums[t, r] = sum_i codes[t, i] * weight[r, i]: int8 [m, k] and [n, k] -> int32 [m, n].
void panguq_int8_sums(const int8_t* codes, const int8_t* weight, int32_t* sums, int64_t m,
                      int64_t n, int64_t k) {
  std::vector<uint8_t> shifted(m * k);
  for (int64_t i = 0; i < m * k; ++i) shifted[i] = uint8_t(codes[i]) ^ 128;
  const int64_t blocks = (n + kRows - 1) / kRows;
#pragma omp parallel for schedule(static) if (n * k > kLeast)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kRows;
    for (int64_t t = 0; t < m; ++t) {
      const uint8_t* token = shifted.data() + t * k;
      int32_t* found = sums + t * n;
      if (first + kRows <= n) {
        products<kRows>(token, weight + first * k, found + first, k);
      } else {
        for (int64_t r = first; r < n; ++r) products<1>(token, weight + r * k, found + r, k);
      }
    }
  }
}

// The same as compiled code calls it, by the name that torch gives an op of ours.
AOTITorchError aoti_torch_cpu_int8_sums(AtenTensorHandle codes, AtenTensorHandle weight,
                                        AtenTensorHandle* result) {
  int64_t m = 0, n = 0, k = 0;
  void *from = nullptr, *by = nullptr, *to = nullptr;
  if (aoti_torch_get_size(codes, 0, &m) || aoti_torch_get_size(weight, 0, &n) ||
      aoti_torch_get_size(codes, 1, &k) || !lies_row_by_row(codes, m, k) ||
      !lies_row_by_row(weight, n, k)) {
    return 1;
  }
  const int64_t sizes[] = {m, n}, strides[] = {n, 1};
  if (aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_int32(),
                               aoti_torch_device_type_cpu(), 0, result) ||
      aoti_torch_get_data_ptr(codes, &from) || aoti_torch_get_data_ptr(weight, &by) ||
      aoti_torch_get_data_ptr(*result, &to)) {
    return 1;
  }
  panguq_int8_sums(static_cast<const int8_t*>(from), static_cast<const int8_t*>(by),
                   static_cast<int32_t*>(to), m, n, k);
  return 0;
}

}
