/* Calls of the kernels in C++, since small activations spend their time in Python: the autograd node of a layer, the
   tracking of all layers, the priors of a forward, and those that several forwards share. Compiled on its own by
   `extension.py`; without it Python calls the same kernels, in `normalize.py`, `track.py` and `priors.py`. */

#include "shared_row.h"
#include "track.h"

namespace {

int (*run_forward)(const Forward *);
int (*run_backward)(const Backward *);

/* Take the addresses of the kernels. */
void initialize(int64_t forward, int64_t backward, int64_t track, int64_t evaluate, int64_t reverse)
{
    run_forward = reinterpret_cast<decltype(run_forward)>(forward);
    run_backward = reinterpret_cast<decltype(run_backward)>(backward);
    run_track = reinterpret_cast<decltype(run_track)>(track);
    run_evaluate = reinterpret_cast<decltype(run_evaluate)>(evaluate);
    run_reverse = reinterpret_cast<decltype(run_reverse)>(reverse);
}

bool has_shape(const Maybe &t, at::IntArrayRef shape)
{
    return !t || (is_plain(*t) && t->is_contiguous() && t->sizes() == shape);
}

/* 1 for channels first, 2 for channels last (which rows of channels are as well), 0 for anything else. */
int64_t layout_of(const Tensor &x)
{
    if (x.is_contiguous())
        return x.dim() > 2 ? 1 : 2;
    if (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast))
        return 2;
    return x.dim() == 5 && x.is_contiguous(at::MemoryFormat::ChannelsLast3d) ? 2 : 0;
}

/* Of an activation that the kernels know, else -1. */
int64_t type_of(const Tensor &x)
{
    bool is_array = x.is_cpu() && x.layout() == at::kStrided;
    auto type = x.scalar_type();
    return !is_array ? -1 : type == at::kFloat ? FLOAT32 : type == at::kBFloat16 ? BFLOAT16 : type == at::kHalf ? FLOAT16 : -1;
}

template <class Call> void describe(Call &call, const Tensor &x, int64_t groups)
{
    call.groups = groups;
    call.images = x.size(0) / groups;
    call.channels = x.size(1);
    call.length = x.numel() / (x.size(0) * x.size(1));
    call.is_channels_last = layout_of(x) - 1;
    call.threads = at::get_num_threads();
    call.type = type_of(x);
}

Tensor or_nothing(const Maybe &t)
{
    return t.value_or(Tensor());
}

int64_t stride_of(const Tensor &prior_mean)
{
    return prior_mean.defined() && prior_mean.dim() > 1 ? prior_mean.size(-1) : 0;
}

/* Whether a gradient is held by nobody else, as PyTorch asks before it adds to one in place. */
bool is_alone(const Tensor &t)
{
    return t.use_count() == 1 && t.has_storage() && t.storage().use_count() == 1;
}

struct Normalize : torch::autograd::Function<Normalize> {
    static variable_list forward(AutogradContext *ctx, const Tensor &x, const Maybe &prior_mean,
                                 const Maybe &prior_variance, const Tensor &gain, const Maybe &weight,
                                 const Maybe &bias, const Maybe &used, const Maybe &gathered, double eps,
                                 int64_t groups)
    {
        Tensor y = at::empty_like(x), statistics = at::empty({6, groups, x.size(1)}, gain.options());
        Tensor mean = or_nothing(prior_mean), variance = or_nothing(prior_variance), scale = or_nothing(weight);
        Forward f = {};
        describe(f, x, groups);
        f.x = x.data_ptr(), f.prior_mean = values_of(mean), f.prior_variance = values_of(variance);
        f.prior_stride = stride_of(mean);
        f.gain = values_of(gain), f.weight = values_of(scale), f.bias = values_of(or_nothing(bias));
        f.y = y.data_ptr(), f.statistics = values_of(statistics), f.eps = eps;
        TORCH_CHECK(!run_forward(&f), "a normalization layer found no memory for its statistics");
        ctx->save_for_backward({x, mean, variance, gain, scale, statistics});
        ctx->set_materialize_grads(false);
        ctx->saved_data["numbers"] = std::vector<double>{eps, bias ? 1.0 : 0.0};
        if (gathered)
            ctx->saved_data["used"] = *used, ctx->saved_data["gathered"] = *gathered;
        return {y, statistics};
    }

    /* The gradients are PyTorch's own list, so that one which nobody else holds is seen to be alone. */
    static variable_list backward(AutogradContext *ctx, variable_list &gradients)
    {
        bool is_recorded = at::GradMode::is_enabled();
        variable_list results, saved = ctx->get_saved_variables();
        {
            at::AutoGradMode off(false);
            bool takes = !is_recorded && gradients[0].defined() && is_alone(gradients[0]);
            results = closed_form(ctx, saved, gradients, takes);
        }
        if (is_recorded)
            refuse_to_go_on(results, gradients, saved);
        results.resize(10); /* the rest of the arguments has no gradient */
        return results;
    }

    /* `takes`: the gradient of x may take the place of that of y, which then needs no memory of its own. */
    static variable_list closed_form(AutogradContext *ctx, const variable_list &saved, const variable_list &gradients,
                                     bool takes)
    {
        auto numbers = ctx->saved_data["numbers"].toDoubleVector();
        const Tensor &x = saved[0], &prior_mean = saved[1], &gain = saved[3], &weight = saved[4];
        Tensor dy = gradients[0], to_statistics = gradients[1];
        if (!dy.defined())
            dy = at::zeros_like(x), takes = true;
        else if (type_of(dy) != type_of(x) || dy.strides() != x.strides())
            dy = at::empty_like(x).copy_(dy), takes = true;
        if (to_statistics.defined())
            to_statistics = to_statistics.contiguous();
        bool has_prior = prior_mean.defined();
        Tensor dx = takes ? dy : at::empty_like(x), to_bias = at::empty({x.size(1)}, gain.options());
        Tensor to_weight = weight.defined() ? at::empty_like(weight) : Tensor();
        Tensor to_mean, to_variance, to_gain;
        if (has_prior) { /* together: they live until all layers are passed, between tensors that go before */
            int64_t size = prior_mean.numel();
            Tensor together = at::empty({2 * size + 1}, gain.options());
            to_mean = together.narrow(0, 0, size).view_as(prior_mean);
            to_variance = together.narrow(0, size, size).view_as(prior_mean);
            to_gain = together.select(0, 2 * size);
        }
        Backward b = {};
        describe(b, x, saved[5].size(1));
        b.dy = dy.data_ptr(), b.x = x.data_ptr();
        b.prior_mean = values_of(prior_mean), b.prior_variance = values_of(saved[2]);
        b.prior_stride = stride_of(prior_mean);
        b.gain = values_of(gain), b.weight = values_of(weight), b.statistics = values_of(saved[5]);
        b.to_statistics = values_of(to_statistics);
        b.dx = dx.data_ptr(), b.to_weight = values_of(to_weight), b.to_bias = values_of(to_bias);
        b.to_prior_mean = values_of(to_mean), b.to_prior_variance = values_of(to_variance);
        b.to_gain = values_of(to_gain);
        auto gathered = ctx->saved_data.find("gathered");
        if (gathered != ctx->saved_data.end()) {
            b.sensitivity = values_of(ctx->saved_data["used"].toTensor());
            b.gathered = values_of(gathered->second.toTensor());
        }
        b.eps = numbers[0];
        TORCH_CHECK(!run_backward(&b), "a normalization layer found no memory for its statistics");
        return {dx, to_mean, to_variance, to_gain, to_weight, numbers[1] != 0 ? to_bias : Tensor()};
    }
};

/* Return y and the statistics, or nothing where the kernels cannot take these tensors: they trust every type, layout
   and shape. */
std::vector<Tensor> normalize(const Tensor &x, const Maybe &prior_mean, const Maybe &prior_variance, const Tensor &gain,
                              const Maybe &weight, const Maybe &bias, const Maybe &used, const Maybe &gathered,
                              double eps, int64_t groups)
{
    if (type_of(x) < 0 || x.dim() < 2 || !x.numel() || !layout_of(x) || gain.dim() || !is_plain(gain))
        return {};
    auto vector = x.sizes().slice(1, 1);
    for (const Maybe *t : {&weight, &bias})
        if (!has_shape(*t, vector))
            return {};
    int64_t wide[] = {groups, x.size(1)}, pair[] = {2, x.size(1)}, three[] = {3, x.size(1)};
    if (!has_shape(used, pair) || !has_shape(gathered, three))
        return {};
    for (const Maybe *t : {&prior_mean, &prior_variance})
        if (!has_shape(*t, vector) && !(has_shape(*t, wide) && has_shape(prior_mean, wide) && has_shape(prior_variance, wide)))
            return {};
    return Normalize::apply(x, prior_mean, prior_variance, gain, weight, bias, used, gathered, eps, groups);
}

} // namespace

TORCH_LIBRARY(bkn, library)
{
    library.def("initialize(int forward, int backward, int track, int evaluate, int reverse) -> ()", initialize);
    library.def("normalize(Tensor x, Tensor? prior_mean, Tensor? prior_variance, Tensor gain, Tensor? weight, Tensor? bias, "
                "Tensor? used, Tensor? gathered, float eps, int groups) -> Tensor[]",
                normalize);
    library.def("track(Tensor[] tensors, int[] forms, float[] numbers, bool is_alone) -> Tensor[]?", track);
    library.class_<Lowered>("Program")
        .def(torch::init<std::vector<Tensor>, std::vector<Tensor>, std::vector<int64_t>, std::vector<int64_t>, int64_t,
                         int64_t>())
        .def("predict", predict);
    library.class_<SharedRow>("SharedRow")
        .def(torch::init<c10::intrusive_ptr<Lowered>, std::vector<Tensor>>())
        .def("parts", &SharedRow::parts)
        .def("begin", &SharedRow::begin)
        .def("finish", &SharedRow::finish);
}
