/* What `track.py` does in a call of the kernels, from C++. */

#pragma once

#include "shared_row.h"

namespace {

int (*run_track)(const Records *);

/* Reads the tensors of the records of `track.py`, as far as each is there, one after the other. */
struct Reader {
    const std::vector<Tensor> &tensors;
    size_t at = 0;
    bool fits = true;
    std::vector<Tensor> moved{};

    const Tensor &next()
    {
        return tensors.at(at++);
    }
    float *values(at::IntArrayRef shape, bool moves)
    {
        const Tensor &t = next();
        fits = fits && is_dense(t) && t.sizes() == shape;
        if (fits && moves)
            moved.push_back(t);
        return fits ? t.data_ptr<float>() : nullptr;
    }
};

/* Move what layers remember, and count. Return the inflations of the variance and of the mean as they were, by turns, or
   nothing where the kernel cannot take these tensors. `forms` says which tensors a record has, see `track.py`;
   `numbers` are three to a record, see `Tracked`. */
std::optional<std::vector<Tensor>> track(const std::vector<Tensor> &tensors, const std::vector<int64_t> &forms,
                                         const std::vector<double> &numbers, bool is_alone)
{
    size_t expected = 0;
    for (int64_t form : forms)
        expected += 1 + (form & 1 ? 8 : 0) + (form & 2 ? 2 : 0) + (form & 4 ? 1 : 0) + (form & 8 ? 1 : 0);
    if (tensors.size() != expected)
        return std::nullopt;
    Reader reader{tensors};
    std::vector<Tracked> rows;
    std::vector<Tensor> before, counts;
    std::vector<int64_t> widths, skipped(forms.size());
    std::vector<size_t> counted; /* the record of each count */
    for (size_t i = 0; i < forms.size(); i++) {
        const Tensor &seen = reader.next();
        if (!is_dense(seen) || seen.dim() != 3)
            return std::nullopt;
        Tracked row = {};
        row.groups = seen.size(1), row.channels = seen.size(2), row.statistics = seen.data_ptr<float>();
        if (forms[i] & 1) {
            const Tensor &mean = reader.next(), &variance = reader.next();
            auto wide = seen.sizes().slice(1);
            if (!is_dense(mean) || !is_dense(variance) || mean.sizes() != variance.sizes() ||
                (mean.sizes() != wide && mean.sizes() != wide.slice(1)))
                return std::nullopt;
            row.prior_mean = mean.data_ptr<float>(), row.prior_variance = variance.data_ptr<float>();
            row.prior_stride = mean.dim() > 1 ? row.channels : 0;
            for (int j = 0; j < 2; j++)
                before.push_back(reader.tensors.at(reader.at + j)), widths.push_back(row.channels);
            int64_t vector[] = {row.channels}, pair[] = {2, row.channels}, three[] = {3, row.channels}, five[] = {5};
            row.inflation = reader.values(vector, true), row.mean_inflation = reader.values(vector, true);
            row.sensitivity = reader.values(pair, true), row.residual = reader.values(pair, true);
            row.gathered = reader.values(three, true), row.uncertainty = reader.values(five, true);
        }
        if (forms[i] & 8)
            row.gain = reader.values({}, true);
        if (forms[i] & 2) {
            int64_t vector[] = {row.channels};
            row.running_mean = reader.values(vector, true), row.running_var = reader.values(vector, true);
        }
        if (forms[i] & 4)
            counts.push_back(reader.next()), counted.push_back(i);
        row.skipped = &skipped[i];
        row.slowest = numbers[3 * i], row.momentum = numbers[3 * i + 1], row.eps = numbers[3 * i + 2];
        rows.push_back(row);
    }
    for (const Tensor &count : counts)
        if (!count.is_cpu() || count.scalar_type() != at::kLong)
            return std::nullopt;
    if (!reader.fits)
        return std::nullopt;
    at::AutoGradMode off(false);
    if (!before.empty())
        before = at::cat(before).split_with_sizes(widths);
    Records all = {static_cast<int64_t>(rows.size()), is_alone ? at::get_num_threads() : 1, rows.data()};
    run_track(&all);
    for (const Tensor &t : reader.moved)
        note_change(t);
    for (size_t i = 0; i < counts.size(); i++) {
        *counts[i].data_ptr<int64_t>() += !skipped[counted[i]];
        note_change(counts[i]);
    }
    return before;
}

} // namespace
