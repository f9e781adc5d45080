// Functions of tensors that are called again and again, on a GPU from a CUDA graph: one launch starts all of it. A
// sweep through a small network is a few hundred launches of a few microseconds each, and a host needs longer for one.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "recording.h"

namespace fastvae {

inline int64_t bytes_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.numel() * static_cast<int64_t>(tensor.element_size()) : 0;
}
inline const void* place_of(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }

// All of a tensor that calls depend on besides its numbers, as bytes to compare.
void append_form(std::string& text, const at::Tensor& tensor);
void append_number(std::string& text, int64_t number);

struct Replayed {
  std::vector<at::Tensor> results;
  // While it lives nobody writes to the results' memory, which is the graph's. Null: they are as any other tensors.
  std::shared_ptr<const void> lease;
};

// The results as tensors that anybody may keep: of the first ones, `owned` of them, copies where they are small; of the
// others the same memory, with a share in the lease for as long as it is used.
std::vector<at::Tensor> kept_results(const Replayed& run, size_t owned);
// Whether the tensor's memory is under a lease: it comes again and again at the same place.
bool is_under_lease(const at::Tensor& tensor);

// The last inputs: parameters, which mostly stay where they are, then results that are under a lease, which never move.
struct Lasting {
  size_t parameters = 0, leased = 0;
};

// Graphs by the form of the inputs. A graph reads an input where it lies if it has lain there before, and a copy
// otherwise; it is replayed once nobody uses the results of its last run. From any thread.
class Replays {
 public:
  Replays();
  ~Replays();
  Replays(const Replays&) = delete;
  Replays& operator=(const Replays&) = delete;

  // function(inputs), after two runs in this form from a graph; name: what else it depends on. Some input lies on a
  // GPU.
  Replayed run(const std::string& name, const std::vector<at::Tensor>& inputs, const Lasting& lasting,
               const TensorFunction& function);

  // Forget all graphs; results that somebody holds keep theirs.
  void release();

 private:
  struct Graph;
  struct Form;
  std::shared_ptr<Graph> found(Form& form, const std::vector<at::Tensor>& inputs, const Lasting& lasting) const;
  bool is_due(Form& form, const std::vector<at::Tensor>& inputs, const Lasting& lasting) const;
  Replayed replay(Form& form, const std::shared_ptr<Graph>& graph, const std::vector<at::Tensor>& inputs) const;
  void make_room();
  static size_t movable(const Form& form, size_t inputs, const Lasting& lasting);

  std::mutex mutex_;
  std::unordered_map<std::string, Form> forms_;
  int64_t calls_ = 0;
};

// Captures and replays of this process, and bytes that its graphs hold.
std::array<int64_t, 3> replay_counts();
// Of all Replays.
void release_graphs();

// An operator's name and what it is called with besides tensors.
struct CallText {
  std::string_view op;
  std::initializer_list<std::string_view> texts;
  at::IntArrayRef numbers;
};
// The same text for a function of tensors on that device, which on a GPU may be called again at any time.
std::string_view lasting_text(std::string_view text, const at::Tensor& like);
std::vector<at::Tensor> joined(std::initializer_list<at::Tensor> tensors, at::TensorList others);

// Of the operators, of which nobody needs to know that their results are under a lease.
std::vector<at::Tensor> replayed(const CallText& call, const std::vector<at::Tensor>& inputs, const Lasting& lasting,
                                 size_t owned, const TensorFunction& function);

}  // namespace fastvae
