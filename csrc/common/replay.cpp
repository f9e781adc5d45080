#include "replay.h"

#include <ATen/Context.h>
#include <ATen/ops/_foreach_copy.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <set>
#include <string_view>
#include <utility>

#include "launch.h"

namespace fastvae {

namespace {

// Runs before a capture: kernels are loaded by then, and what moves has moved.
constexpr int64_t kWarmUp = 2;
// Graphs of one form: their results may be held for a while, as by two passes before a way back.
constexpr size_t kMostGraphs = 4;
// Forms that are remembered.
constexpr size_t kMostForms = 64;
// Captures of a form after which replays have to be so many times as many: a capture takes as long as two runs.
constexpr int64_t kTried = 8, kWorthwhile = 4;
// Bytes of inputs that are copied, beyond which a GPU has enough to do.
constexpr int64_t kMostCopied = int64_t{16} << 20;
// Parts of a GPU's memory that one graph and all of them may hold: results, and what is needed on the way to them.
constexpr int64_t kPartOfOne = 32, kPartOfAll = 8;

int64_t bytes_of_all(const std::vector<at::Tensor>& tensors) {
  int64_t bytes = 0;
  for (const at::Tensor& tensor : tensors) {
    bytes += bytes_of(tensor);
  }
  return bytes;
}

// Bytes that graphs hold, captures and replays so far, for whoever wants to know.
std::atomic<int64_t> held_in_all{0}, captures_in_all{0}, replays_in_all{0};

bool is_wanted() {
  static const bool wanted = [] {
    const char* value = std::getenv("FASTVAE_CUDA_GRAPHS");
    return value == nullptr || std::string_view(value) != "0";
  }();
  return wanted;
}

// Whether a graph can take the place of a call: nobody else captures or looks on, and nothing has to be refused.
bool may_replay(const std::vector<at::Tensor>& inputs) {
  const auto is_plain = [](const at::Tensor& tensor) {
    return !tensor.defined() || (runs_cuda(tensor) && tensor.layout() == at::kStrided && !tensor.is_conj() &&
                                 !tensor.is_neg() && !tensor._fw_grad(/*level=*/0).defined());
  };
  return is_wanted() && std::all_of(inputs.begin(), inputs.end(), is_plain) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && !is_capturing();
}

// What the calls depend on besides name and inputs.
std::string form_of(const std::string& name, const std::vector<at::Tensor>& inputs) {
  std::string text = name;
  const at::Context& context = at::globalContext();
  append_number(text, stream_id());
  append_number(text,
                static_cast<int64_t>(context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL)) * 16 +
                    static_cast<int64_t>(context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::CONV)));
  append_number(text, (context.deterministicAlgorithms() ? 1 : 0) + (context.deterministicCuDNN() ? 2 : 0) +
                          (context.benchmarkCuDNN() ? 4 : 0));
  for (const at::Tensor& input : inputs) {
    append_form(text, input);
  }
  return text;
}

}  // namespace

void append_number(std::string& text, int64_t number) {
  text.append(reinterpret_cast<const char*>(&number), sizeof(number));
}

void append_form(std::string& text, const at::Tensor& tensor) {
  if (!tensor.defined()) {
    append_number(text, -1);
    return;
  }
  append_number(text, tensor.dim());
  for (const auto& numbers : {tensor.sizes(), tensor.strides()}) {
    text.append(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t));
  }
  append_number(text, static_cast<int64_t>(tensor.scalar_type()));
  append_number(text, static_cast<int64_t>(tensor.device().type()) * 256 + tensor.device().index());
}

struct Replays::Graph {
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() { held_in_all -= held; }

  Recording recording;
  int64_t held = 0;  // bytes
  std::vector<bool> is_copied;
  std::vector<const void*> places;  // of the inputs that are not
  std::vector<at::Tensor> inputs;   // copies; undefined where there is none
  std::vector<at::Tensor> results;
  std::weak_ptr<const void> lease;
};

struct Replays::Form {
  std::vector<std::shared_ptr<Graph>> graphs;
  std::vector<const void*> places;  // of the last call's inputs
  std::vector<bool> moves;          // inputs that have lain elsewhere
  int64_t seen = 0, captures = 0, replays = 0, last_call = 0;
  int64_t results = 0;  // bytes
  bool is_given_up = false;
};

// How many of the inputs, the first ones, are copied where they move. Parameters that lie elsewhere are another
// model's, which gets a graph of its own; only after many of them they are what somebody computes anew each time.
size_t Replays::movable(const Form& form, size_t inputs, const Lasting& lasting) {
  return inputs - lasting.leased - (form.captures < static_cast<int64_t>(kMostGraphs) ? lasting.parameters : 0);
}

namespace {

// All that live. Never destroyed: some live as long as the process.
struct Everyone {
  std::mutex mutex;
  std::set<Replays*> all;
};

Everyone& everyone() {
  static Everyone& found = *new Everyone;
  return found;
}

}  // namespace

Replays::Replays() {
  const std::lock_guard<std::mutex> locked(everyone().mutex);
  everyone().all.insert(this);
}

Replays::~Replays() {
  const std::lock_guard<std::mutex> locked(everyone().mutex);
  everyone().all.erase(this);
}

void Replays::release() {
  const std::lock_guard<std::mutex> locked(mutex_);
  forms_.clear();
}

void release_graphs() {
  const std::lock_guard<std::mutex> locked(everyone().mutex);
  for (Replays* replays : everyone().all) {
    replays->release();
  }
}

std::shared_ptr<Replays::Graph> Replays::found(Form& form, const std::vector<at::Tensor>& inputs,
                                               const Lasting& lasting) const {
  const size_t free = movable(form, inputs.size(), lasting);
  const auto lies_there = [&](const Graph& graph, size_t first, size_t end) {
    for (size_t at = first; at < end; ++at) {
      if (!graph.is_copied[at] && graph.places[at] != place_of(inputs[at])) {
        return false;
      }
    }
    return true;
  };
  for (const auto& graph : form.graphs) {
    if (graph->lease.expired() && lies_there(*graph, 0, inputs.size())) {
      return graph;
    }
  }
  // An input that lay there by chance is copied from now on.
  std::erase_if(form.graphs, [&](const std::shared_ptr<Graph>& graph) {
    if (!graph->lease.expired() || !lies_there(*graph, free, inputs.size())) {
      return false;
    }
    for (size_t at = 0; at < free; ++at) {
      form.moves[at] = form.moves[at] || (!graph->is_copied[at] && graph->places[at] != place_of(inputs[at]));
    }
    return true;
  });
  return nullptr;
}

bool Replays::is_due(Form& form, const std::vector<at::Tensor>& inputs, const Lasting& lasting) const {
  for (size_t at = 0; at < inputs.size(); ++at) {
    const void* place = place_of(inputs[at]);
    form.moves[at] = form.moves[at] || (form.seen > 0 && form.places[at] != place);
    form.places[at] = place;
  }
  if (form.seen++ < kWarmUp) {
    return false;
  }
  if (form.graphs.size() >= kMostGraphs) {
    // One whose pinned inputs are no more, if its results are free.
    const auto oldest =
        std::find_if(form.graphs.begin(), form.graphs.end(), [](const auto& graph) { return graph->lease.expired(); });
    if (oldest == form.graphs.end()) {
      return false;
    }
    form.graphs.erase(oldest);
  }
  int64_t copied = 0;
  for (size_t at = 0; at < movable(form, inputs.size(), lasting); ++at) {
    copied += form.moves[at] ? bytes_of(inputs[at]) : 0;
  }
  form.is_given_up = copied > kMostCopied || form.results > memory_of_gpu() / kPartOfOne ||
                     (form.captures >= kTried && form.replays < kWorthwhile * form.captures);
  return !form.is_given_up && held_in_all + form.results <= memory_of_gpu() / kPartOfAll;
}

Replayed Replays::replay(Form& form, const std::shared_ptr<Graph>& graph, const std::vector<at::Tensor>& inputs) const {
  ++form.replays;
  ++replays_in_all;
  std::vector<at::Tensor> to, from, lying;
  for (size_t at = 0; at < inputs.size(); ++at) {
    const bool copied = graph->is_copied[at] && inputs[at].defined();
    lying.push_back(copied ? graph->inputs[at] : inputs[at]);
    if (copied && inputs[at].numel() > 0) {
      to.push_back(graph->inputs[at]);
      from.push_back(inputs[at]);
    }
  }
  if (!to.empty()) {
    at::_foreach_copy_(to, from);
  }
  graph->recording.replay(lying, graph->results);
  // Not the graph's own count: forms hold it, too.
  const auto lease = std::make_shared<const std::shared_ptr<Graph>>(graph);
  graph->lease = lease;
  return {graph->results, lease};
}

Replayed Replays::run(const std::string& name, const std::vector<at::Tensor>& inputs, const Lasting& lasting,
                      const TensorFunction& function) {
  if (!may_replay(inputs)) {
    return {function(inputs), nullptr};
  }
  const std::string key = form_of(name, inputs);
  const auto form_named = [&]() -> Form& {
    Form& form = forms_[key];
    form.places.resize(inputs.size());
    form.moves.resize(inputs.size());
    form.last_call = ++calls_;
    return form;
  };
  bool due = false;
  {
    const std::lock_guard<std::mutex> locked(mutex_);
    Form& form = form_named();
    if (!form.is_given_up) {
      if (const std::shared_ptr<Graph> graph = found(form, inputs, lasting)) {
        return replay(form, graph, inputs);
      }
      due = is_due(form, inputs, lasting);
    }
  }
  if (!due) {
    std::vector<at::Tensor> results = function(inputs);
    const std::lock_guard<std::mutex> locked(mutex_);
    form_named().results = bytes_of_all(results);
    make_room();
    return {std::move(results), nullptr};
  }
  // Nobody waits for a capture, in which anything may be called.
  const auto graph = std::make_shared<Graph>();
  {
    const std::lock_guard<std::mutex> locked(mutex_);
    const Form& form = form_named();
    graph->is_copied = form.moves;
    std::fill(graph->is_copied.begin() + static_cast<int64_t>(movable(form, inputs.size(), lasting)),
              graph->is_copied.end(), false);
  }
  graph->inputs.resize(inputs.size());
  std::vector<at::Tensor> lying = inputs;
  for (size_t at = 0; at < inputs.size(); ++at) {
    graph->places.push_back(place_of(inputs[at]));
    if (graph->is_copied[at] && inputs[at].defined()) {
      lying[at] = graph->inputs[at] = inputs[at].clone();
    }
  }
  bool failed = false;
  try {
    const int64_t before = reserved_bytes();
    graph->results = graph->recording.capture(function, lying);
    graph->held = std::max(reserved_bytes() - before, bytes_of_all(graph->results));
    held_in_all += graph->held;
    ++captures_in_all;
    failed = graph->held > memory_of_gpu() / kPartOfOne ||
             std::any_of(graph->results.begin(), graph->results.end(),
                         [](const at::Tensor& result) { return result.defined() && !runs_cuda(result); });
  } catch (const std::exception&) {
    failed = true;
  }
  if (!failed) {
    const std::lock_guard<std::mutex> locked(mutex_);
    Form& form = form_named();
    ++form.captures;
    form.graphs.push_back(graph);
    return replay(form, graph, inputs);
  }
  {
    const std::lock_guard<std::mutex> locked(mutex_);
    form_named().is_given_up = true;
  }
  return {function(inputs), nullptr};
}

void Replays::make_room() {
  while (forms_.size() > kMostForms) {
    forms_.erase(std::min_element(forms_.begin(), forms_.end(), [](const auto& a, const auto& b) {
      return a.second.last_call < b.second.last_call;
    }));
  }
}

std::array<int64_t, 3> replay_counts() { return {captures_in_all, replays_in_all, held_in_all}; }

std::string_view lasting_text(std::string_view text, const at::Tensor& like) {
  if (!runs_cuda(like)) {
    return text;
  }
  static std::mutex& mutex = *new std::mutex;
  static std::set<std::string, std::less<>>& texts = *new std::set<std::string, std::less<>>;
  const std::lock_guard<std::mutex> locked(mutex);
  const auto known = texts.find(text);
  return known != texts.end() ? *known : *texts.emplace(text).first;
}

std::vector<at::Tensor> joined(std::initializer_list<at::Tensor> tensors, at::TensorList others) {
  std::vector<at::Tensor> all(tensors);
  all.insert(all.end(), others.begin(), others.end());
  return all;
}

std::vector<at::Tensor> replayed(const CallText& call, const std::vector<at::Tensor>& inputs, const Lasting& lasting,
                                 size_t owned, const TensorFunction& function) {
  if (std::none_of(inputs.begin(), inputs.end(),
                   [](const at::Tensor& input) { return input.defined() && runs_cuda(input); })) {
    return function(inputs);
  }
  std::string name(call.op);
  for (const std::string_view text : call.texts) {
    name.append("\n").append(text);
  }
  for (const int64_t number : call.numbers) {
    name.append(" ").append(std::to_string(number));
  }
  static Replays& replays = *new Replays;
  return kept_results(replays.run(name, inputs, lasting, function), owned);
}

}  // namespace fastvae
