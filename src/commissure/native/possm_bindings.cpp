// Python bindings of POSSM's streaming step: reads a PossmWeights, chooses the clone for this machine, checks indices.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "possm_step.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace commissure {

PossmStep::~PossmStep() = default;

namespace {

using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Integers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using AnyDoubles = nb::ndarray<const double, nb::c_contig, nb::device::cpu>;

const double* array(nb::handle owner, const char* name) {
    nb::object value = owner.attr(name);
    return value.is_none() ? nullptr : nb::cast<AnyDoubles>(value, false).data();
}
int extent(nb::handle owner, const char* name, size_t axis) {
    return int(nb::cast<AnyDoubles>(owner.attr(name), false).shape(axis));
}

FeedForwardView feed_forward(nb::handle w) {
    return {extent(w, "out_weight", 1), array(w, "norm_weight"), array(w, "norm_bias"), array(w, "in_weight"),
            array(w, "in_bias"),        array(w, "out_weight"),  array(w, "out_bias")};
}

LayerView layer(nb::handle w, Backbone backbone) {
    LayerView v{};
    if (backbone == Backbone::gru) {
        v.inputs = extent(w, "weight_ih", 1);
        v.weight_ih = array(w, "weight_ih"), v.weight_hh = array(w, "weight_hh");
        v.bias_ih = array(w, "bias_ih"), v.bias_hh = array(w, "bias_hh");
        return v;
    }
    v.skip = array(w, "skip"), v.out_weight = array(w, "out_weight");
    if (backbone == Backbone::s4d) {
        v.modes = extent(w, "a_re", 1);
        v.a_re = array(w, "a_re"), v.a_im = array(w, "a_im"), v.c_re = array(w, "c_re"), v.c_im = array(w, "c_im");
        v.out_bias = array(w, "out_bias");
        return v;
    }
    v.inner = extent(w, "a", 0), v.modes = extent(w, "a", 1);
    v.taps = extent(w, "conv_weight", 1), v.rank = extent(w, "dt_weight", 1);
    v.in_weight = array(w, "in_weight"), v.conv_weight = array(w, "conv_weight"), v.conv_bias = array(w, "conv_bias");
    v.x_weight = array(w, "x_weight"), v.dt_weight = array(w, "dt_weight"), v.dt_bias = array(w, "dt_bias");
    v.a = array(w, "a");
    return v;
}

PossmView view(nb::handle w, std::vector<LayerView>& layers) {
    PossmView v{};
    v.softmax = nb::cast<std::string>(w.attr("encoder")) == "softmax";
    v.null_always = nb::cast<std::string>(w.attr("null_token")) == "always";
    const std::string backbone = nb::cast<std::string>(w.attr("backbone"));
    v.backbone = backbone == "gru" ? Backbone::gru : backbone == "s4d" ? Backbone::s4d : Backbone::mamba;
    v.chunk_s = nb::cast<double>(w.attr("chunk_s"));
    v.context = nb::cast<int>(w.attr("context"));
    v.dim = extent(w, "latent", 0), v.head = extent(w, "key_weight", 0), v.hidden = extent(w, "key_weight", 1);
    v.frequencies = extent(w, "periods", 0), v.units = extent(w, "unit_value", 0);
    v.outputs = extent(w, "readout_weight", 0);
    v.periods = array(w, "periods"), v.unit_key = array(w, "unit_key"), v.unit_value = array(w, "unit_value");
    v.null_key = array(w, "null_key"), v.null_value = array(w, "null_value"), v.query = array(w, "query");
    v.latent = array(w, "latent"), v.out_weight = array(w, "out_weight"), v.out_bias = array(w, "out_bias");
    v.ffn = feed_forward(w.attr("ffn"));
    v.in_weight = v.backbone == Backbone::gru ? nullptr : array(w, "in_weight");
    v.in_bias = array(w, "in_bias");
    for (nb::handle each : w.attr("layers")) layers.push_back(layer(each, v.backbone));
    v.layers = layers.data(), v.n_layers = int(layers.size());
    v.context_norm_weight = array(w, "context_norm_weight"), v.context_norm_bias = array(w, "context_norm_bias");
    v.key_weight = array(w, "key_weight"), v.value_weight = array(w, "value_weight");
    v.session_query = array(w, "session_query"), v.session_embedding = array(w, "session_embedding");
    v.dec_out_weight = array(w, "dec_out_weight"), v.dec_out_bias = array(w, "dec_out_bias");
    v.has_decoder_ffn = !w.attr("decoder_ffn").is_none();
    if (v.has_decoder_ffn) v.decoder_ffn = feed_forward(w.attr("decoder_ffn"));
    v.readout_weight = array(w, "readout_weight"), v.readout_bias = array(w, "readout_bias");
    v.output_scale = array(w, "output_scale"), v.output_mean = array(w, "output_mean");
    return v;
}

std::vector<std::string> clones() {
    std::vector<std::string> names{"baseline"};
#if COMMISSURE_HAS_V3
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        names.push_back("x86-64-v3");
#endif
    return names;
}

bool use_v3(const std::string& clone) {
    const std::vector<std::string> available = clones();
    const std::string chosen = clone.empty() ? available.back() : clone;
    for (const std::string& name : available)
        if (name == chosen) return chosen != "baseline";
    throw nb::value_error(("this machine or build has no clone '" + chosen + "'").c_str());
}

// One engine behind a lock: two threads (one pushing, one polling) are safe, though calls do wait for each other.
class Handle {
   public:
    Handle(nb::object weights, Doubles offsets, bool single, const std::string& clone) {
        std::vector<LayerView> layers;
        const PossmView v = view(weights, layers);
        PossmFactory factory = possm_step_baseline;
#if COMMISSURE_HAS_V3
        if (use_v3(clone)) factory = possm_step_v3;
#else
        use_v3(clone);
#endif
        step_.reset(factory(v, offsets.data(), offsets.size(), single));
        units_ = v.units, outputs_ = size_t(v.outputs), times_ = offsets.size();
    }
    Handle(const Handle& other) : units_(other.units_), outputs_(other.outputs_), times_(other.times_) {
        std::lock_guard<std::mutex> lock(other.mutex_);
        step_.reset(other.step_->clone());
    }

    // -1, or the index of the first spike that is not one; nothing is folded then.
    int64_t fold(Integers units, Doubles offsets) {
        const size_t n = units.size() < offsets.size() ? units.size() : offsets.size();
        nb::gil_scoped_release release;
        const int64_t* u = units.data();
        const double* d = offsets.data();
        bool fine = true;
        for (size_t i = 0; i < n; ++i) fine &= (uint64_t(u[i]) < uint64_t(units_)) & (std::fabs(d[i]) < 1e9);
        for (size_t i = 0; i < n && !fine; ++i)
            if (uint64_t(u[i]) >= uint64_t(units_) || !(std::fabs(d[i]) < 1e9)) return int64_t(i);
        std::lock_guard<std::mutex> lock(mutex_);
        step_->fold(u, d, n);
        return -1;
    }
    // Output times relative to the chunk's end: the default ones, or those given; none at all encodes only.
    nb::object close(std::optional<Doubles> offsets, bool readout) {
        const size_t n = !readout ? 0 : offsets ? offsets->size() : times_;
        double* data = new double[n * outputs_ + 1];
        nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<double*>(p); });
        {
            nb::gil_scoped_release release;
            std::lock_guard<std::mutex> lock(mutex_);
            step_->close(offsets ? offsets->data() : nullptr, n, data);
        }
        return nb::cast(nb::ndarray<nb::numpy, double>(data, {n, outputs_}, owner));
    }
    void idle() {
        nb::gil_scoped_release release;
        std::lock_guard<std::mutex> lock(mutex_);
        step_->idle();
    }
    void reset() {
        std::lock_guard<std::mutex> lock(mutex_);
        step_->reset();
    }
    nb::object save() const {
        const size_t n = step_->state_size();
        double* data = new double[n];
        nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<double*>(p); });
        std::lock_guard<std::mutex> lock(mutex_);
        step_->save(data);
        return nb::cast(nb::ndarray<nb::numpy, double>(data, {n}, owner));
    }
    void load(Doubles state) {
        if (state.size() != step_->state_size()) throw nb::value_error("state of another engine");
        std::lock_guard<std::mutex> lock(mutex_);
        step_->load(state.data());
    }

   private:
    std::unique_ptr<PossmStep> step_;
    mutable std::mutex mutex_;
    int64_t units_;
    size_t outputs_, times_;
};

nb::object elementary(const std::string& name, Doubles x, bool single, const std::string& clone) {
    double* data = new double[x.size() + 1];
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<double*>(p); });
    auto function = elementary_baseline;
#if COMMISSURE_HAS_V3
    if (use_v3(clone)) function = elementary_v3;
#endif
    if (!function(name.c_str(), single, x.data(), data, x.size())) throw nb::value_error("unknown function");
    return nb::cast(nb::ndarray<nb::numpy, double>(data, {x.size()}, owner));
}

}  // namespace

void bind_possm(nb::module_& m) {
    nb::class_<Handle>(m, "PossmStep")
        .def(nb::init<nb::object, Doubles, bool, const std::string&>(), "weights"_a, "offsets"_a, "single"_a, "clone"_a)
        .def("fold", &Handle::fold, "units"_a.noconvert(), "offsets"_a.noconvert())
        .def("close", &Handle::close, "offsets"_a.noconvert().none(), "readout"_a)
        .def("idle", &Handle::idle)
        .def("reset", &Handle::reset)
        .def("save", &Handle::save)
        .def("load", &Handle::load, "state"_a.noconvert())
        .def("copy", [](const Handle& self) { return new Handle(self); }, nb::rv_policy::take_ownership);
    m.def("clones", &clones, "The instruction sets this machine can run, best last.");
    m.def("elementary", &elementary, "name"_a, "x"_a.noconvert(), "single"_a, "clone"_a);
}

}  // namespace commissure
