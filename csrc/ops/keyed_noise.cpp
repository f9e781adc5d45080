// Noise keyed by sample (kernels/keyed_noise.h): check, allocate, launch.
#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/launch.h"
#include "../common/operator.h"

namespace fastvae {
namespace {

void check_keys(const char* op, const at::Tensor& keys) {
  check_device(op, "keys", keys);
  FASTVAE_CHECK_TYPE(keys.scalar_type() == at::kLong, op, "keys", "int64", describe(keys));
  FASTVAE_CHECK_VALUE(keys.dim() == 1, op, "keys", "shape [rows]", describe(keys));
}

const uint64_t* words_of(const at::Tensor& keys) {
  return reinterpret_cast<const uint64_t*>(keys.const_data_ptr<int64_t>());
}

// keyed_bits or normal numbers, [rows, count].
at::Tensor keyed_numbers(const char* op, const at::Tensor& keys, int64_t first, int64_t count, bool normal) {
  const EntryGuard guard(op, keys);
  check_keys(op, keys);
  FASTVAE_CHECK_VALUE(count >= 0, op, "count", "at least 0", count);
  const at::Tensor dense = keys.contiguous();
  at::Tensor out = aten::empty({keys.size(0), count}, keys.options().dtype(normal ? at::kDouble : at::kLong));
  KeyedNumbers args{};
  args.keys = words_of(dense);
  args.bits = normal ? nullptr : reinterpret_cast<uint64_t*>(out.mutable_data_ptr<int64_t>());
  args.normal = normal ? out.mutable_data_ptr<double>() : nullptr;
  args.rows = keys.size(0);
  args.count = count;
  args.first = static_cast<uint64_t>(first);
  FASTVAE_LAUNCH(keyed_numbers, keys.device(), args, args.rows, args.count);
  return out;
}

// int64 keys [B] of the bytes of x [B, ...].
at::Tensor sample_keys(const at::Tensor& x) {
  constexpr const char* op = "sample_keys";
  const EntryGuard guard(op, x);
  check_device(op, "x", x);
  FASTVAE_CHECK_VALUE(x.dim() > 0, op, "x", "shape [B, ...]", describe(x));
  at::Tensor rows = x.contiguous().view({x.size(0), x.size(0) == 0 ? 0 : x.numel() / x.size(0)}).view(at::kByte);
  constexpr int64_t kWord = 8;
  const auto address = reinterpret_cast<uintptr_t>(rows.const_data_ptr());
  if (runs_cuda(rows) && (rows.size(1) % kWord != 0 || address % kWord != 0)) {
    // A new tensor, and so an aligned one.
    at::Tensor padded = aten::zeros({rows.size(0), (rows.size(1) + kWord - 1) / kWord * kWord}, rows.options());
    padded.narrow(1, 0, rows.size(1)).copy_(rows);
    rows = padded;
  }
  at::Tensor keys = aten::empty({x.size(0)}, x.options().dtype(at::kLong));
  SampleKeys args{};
  args.bytes = rows.const_data_ptr<uint8_t>();
  args.keys = reinterpret_cast<uint64_t*>(keys.mutable_data_ptr<int64_t>());
  args.samples = x.size(0);
  args.row_bytes = rows.size(1);
  FASTVAE_LAUNCH(sample_keys, x.device(), args, args.samples, args.row_bytes / kWord);
  return keys;
}

// Numbers first .. first + count - 1 of each of int64 keys [rows], [rows, count], as bits (int64), and
at::Tensor keyed_bits(const at::Tensor& keys, int64_t first, int64_t count) {
  return keyed_numbers("keyed_bits", keys, first, count, false);
}

// standard normal (float64).
at::Tensor keyed_normal(const at::Tensor& keys, int64_t first, int64_t count) {
  return keyed_numbers("keyed_normal", keys, first, count, true);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae_internal, m) {
  define_internal<&sample_keys>(m, "sample_keys(Tensor x) -> Tensor");
  define_internal<&keyed_bits>(m, "keyed_bits(Tensor keys, int first, int count) -> Tensor");
  define_internal<&keyed_normal>(m, "keyed_normal(Tensor keys, int first, int count) -> Tensor");
}

}  // namespace fastvae
