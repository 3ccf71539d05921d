// logit_huber on the CPU: every pair of dtypes, lengths around every vector's, both kinds, plain and centred.
#include "check.h"
#include "kl_math.h"

using namespace test;

namespace {

struct Form {
  bool smooth_l1, center;
  double delta;

  Real value(Real d) const {
    const Real x = std::abs(d);
    if (smooth_l1) return x < delta ? d * d / (2 * delta) : x - Real(delta) / 2;
    return d * d / (1 + std::sqrt(1 + d * d / (Real(delta) * delta)));
  }
  Real slope(Real d) const {
    if (smooth_l1) return std::abs(d) < delta ? d / delta : d < 0 ? -1 : 1;
    return d / std::sqrt(1 + d * d / (Real(delta) * delta));
  }
};

void run(Matrix student, const Matrix& teacher, int64_t classes, const Form& form, const std::string& name) {
  const int64_t rows = student.rows;
  std::vector<double> weight(rows);
  for (int64_t r = 0; r < rows; ++r) weight[r] = r % 3 == 1 ? 0 : 0.5 + double(r % 3);

  // The definition in long double.
  Real expected = 0;
  std::vector<Real> expected_student(rows * student.width), expected_teacher(rows * teacher.width);
  for (int64_t r = 0; r < rows; ++r) {
    if (weight[r] == 0) continue;
    std::vector<Real> d(classes);
    Real mean = 0, mean_slope = 0;
    for (int64_t k = 0; k < classes; ++k) mean += (d[k] = Real(student.get(r, k)) - teacher.get(r, k)) / classes;
    for (int64_t k = 0; k < classes; ++k) {
      d[k] -= form.center ? mean : 0;
      expected += weight[r] * form.value(d[k]);
      mean_slope += form.slope(d[k]) / classes;
    }
    for (int64_t k = 0; k < classes && !(form.center && classes == 1); ++k) {
      const Real slope = form.slope(d[k]) - (form.center ? mean_slope : 0);
      expected_student[r * student.width + k] = weight[r] * slope / 2;  // grad_scale = 0.5
      expected_teacher[r * teacher.width + k] = -weight[r] * slope / 2;
    }
  }

  const DType computed = compute_type(student.dtype, teacher.dtype);
  std::vector<double> row_loss(rows), row_stats(rows * kdfast::HuberStat::count);
  Matrix grad_student(student.dtype, rows, student.width, 1), grad_teacher(teacher.dtype, rows, teacher.width, 5);
  auto args = args_for<kdfast::LogitHuberArgs>(student, teacher, classes);
  args.center = form.center;
  args.smooth_l1 = form.smooth_l1;
  args.delta = form.delta;
  args.weight = {weight.data(), kdfast::NumberType::f64};
  args.grad_scale = 0.5;
  args.row_loss = row_loss.data();
  args.row_stats = form.center ? row_stats.data() : nullptr;
  args.grad_student = grad_student.gradient();
  kdfast::cpu::logit_huber_forward(args, 0, rows);

  const Real loss = total(row_loss.data(), computed, rows);
  const Real error = std::abs(loss - expected);
  if (!(form.center && classes == 1))
    check_error(error / expected, loss_budget(computed), name + " loss");
  else
    check(loss == 0, name + " loss of one centred class");
  check_gradient(grad_student, expected_student, computed, name + " student's gradient, forward");

  args.grad_teacher = grad_teacher.gradient();
  args.grad_student = student.gradient();
  kdfast::cpu::logit_huber_backward(args, 0, rows);
  check_gradient(student, expected_student, computed, name + " student's gradient, backward in place");
  check_gradient(grad_teacher, expected_teacher, computed, name + " teacher's gradient, backward for both");
}

}  // namespace

int main() {
  skip_without_isa();
  const Form forms[] = {{false, false, 1}, {true, false, 0.5}, {false, true, 0.25}, {true, true, 2}};
  unsigned seed = 0;
  for (const DType s : kDTypes)
    for (const DType t : kDTypes)
      for (const int64_t classes : {1, 2, 7, 8, 9, 16, 17, 33, 100, 513})
        for (const Form& form : forms) {
          ++seed;
          Matrix student = random_logits(s, 5, classes + seed % 4, seed),
                 teacher = random_logits(t, 5, classes + seed % 3, seed + 1);
          for (int64_t k = 0; k < student.width; ++k) student.set(1, k, kNan);  // a row of weight 0
          run(student, teacher, classes, form,
              std::string(kDTypeNames[int(s)]) + "-" + kDTypeNames[int(t)] + " K=" + std::to_string(classes) +
                  (form.smooth_l1 ? " smooth L1" : " pseudo-Huber") + (form.center ? " centred" : ""));
        }
  return report();
}
