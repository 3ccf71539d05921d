// kd_loss on the CPU: every pair of dtypes it takes, lengths around every vector's, each soft part, shared and own
// exponentials.
#include "check.h"
#include "kl_math.h"

using namespace test;

namespace {

struct Form {
  kdfast::Soft soft;
  double tau, alpha, smoothing;
};

// q and its logarithm for one row at temperature tau.
void log_softmax(const Matrix& logits, int64_t r, int64_t classes, double tau, std::vector<Real>& log_q) {
  Real top = -kInf, total = 0;
  for (int64_t k = 0; k < classes; ++k) top = std::max(top, Real(logits.get(r, k)));
  for (int64_t k = 0; k < classes; ++k) total += std::exp((logits.get(r, k) - top) / tau);
  for (int64_t k = 0; k < classes; ++k) log_q[k] = (logits.get(r, k) - top) / tau - std::log(total);
}

void run(Matrix student, const Matrix& teacher, int64_t classes, const Form& form, const std::string& name) {
  const int64_t rows = student.rows;
  std::vector<double> weight(rows);
  std::vector<int64_t> target(rows);
  for (int64_t r = 0; r < rows; ++r) {
    weight[r] = r % 3 == 1 ? 0 : 0.5 + double(r % 3);
    target[r] = r == 1 ? classes + 7 : r == 3 ? -100 : (5 * r + 1) % classes;  // row 1 has weight 0, row 3 is ignored
  }

  // The definition in long double.
  Real expected = 0;
  std::vector<Real> expected_student(rows * student.width), expected_teacher(rows * teacher.width);
  std::vector<Real> log_q(classes), log_p(classes), log_h(classes);
  for (int64_t r = 0; r < rows; ++r) {
    if (weight[r] == 0) continue;
    log_softmax(student, r, classes, form.tau, log_q);
    log_softmax(teacher, r, classes, form.tau, log_p);
    log_softmax(student, r, classes, 1, log_h);
    Real soft = 0, hard = 0;
    for (int64_t k = 0; k < classes; ++k)
      soft += form.soft == kdfast::Soft::kl ? form.tau * form.tau * std::exp(log_p[k]) * (log_p[k] - log_q[k])
                                            : std::pow(Real(student.get(r, k)) - teacher.get(r, k), 2);
    for (int64_t k = 0; k < classes; ++k) {
      const Real d = Real(student.get(r, k)) - teacher.get(r, k);
      const bool kl = form.soft == kdfast::Soft::kl;
      const Real by_student = kl ? form.tau * (std::exp(log_q[k]) - std::exp(log_p[k])) : 2 * d;
      const Real by_teacher =
          kl ? form.tau * std::exp(log_p[k]) * (log_p[k] - log_q[k] - soft / (form.tau * form.tau)) : -2 * d;
      Real by_hard = 0;
      if (target[r] >= 0) {
        const Real label = (k == target[r] ? 1 - form.smoothing : 0) + form.smoothing / classes;
        hard -= label * log_h[k];
        by_hard = std::exp(log_h[k]) - label;
      }
      const bool one = classes == 1;  // nothing to distribute: zero to the bit
      expected_student[r * student.width + k] =
          weight[r] * (form.alpha * (one && kl ? 0 : by_student) + (1 - form.alpha) * (one ? 0 : by_hard));
      expected_teacher[r * teacher.width + k] = one && kl ? 0 : weight[r] * form.alpha * by_teacher;
    }
    expected += weight[r] * ((1 - form.alpha) * hard + form.alpha * soft);
  }

  const DType computed = compute_type(student.dtype, teacher.dtype);
  std::vector<double> hard(rows), soft(rows), whole(rows),
      row_stats(rows * (int(kdfast::KlStat::count) + int(kdfast::HardStat::count)));
  Matrix grad_student(student.dtype, rows, student.width, 1), grad_teacher(teacher.dtype, rows, teacher.width, 5);
  auto args = args_for<kdfast::KdLossArgs>(student, teacher, classes);
  args.soft = form.soft;
  args.tau = args.teacher_tau = form.tau;
  args.scale = form.soft == kdfast::Soft::kl ? form.tau * form.tau : 1;
  args.alpha = form.alpha;
  args.label_smoothing = form.smoothing;
  args.target = {target.data(), kdfast::NumberType::i64};
  args.weight = {weight.data(), kdfast::NumberType::f64};
  args.grad_scale = form.alpha;
  args.hard_grad_scale = 1 - form.alpha;
  args.row_loss = whole.data();
  args.row_hard = hard.data();
  args.row_soft = soft.data();
  args.row_stats = row_stats.data();
  args.grad_student = grad_student.gradient();
  kdfast::cpu::kd_loss_forward(args, 0, rows);

  const Real loss = total(whole.data(), computed, rows);
  const Real error = std::abs(loss - expected);
  check_error(expected > 0 ? error / expected : error, loss_budget(computed), name + " loss");
  check_gradient(grad_student, expected_student, computed, name + " student's gradient, forward");

  args.grad_teacher = grad_teacher.gradient();
  args.grad_student = student.gradient();
  kdfast::cpu::kd_loss_backward(args, 0, rows);
  check_gradient(student, expected_student, computed, name + " student's gradient, backward in place");
  check_gradient(grad_teacher, expected_teacher, computed, name + " teacher's gradient, backward for both");
}

// A target that is no class makes its row NaN, and nothing is read or written elsewhere.
void run_no_class(DType dtype, int64_t classes, double tau) {
  const int64_t targets[] = {classes, -5, int64_t(1) << 44}, rows = 3;
  Matrix student = random_logits(dtype, rows, classes, 1), teacher = random_logits(dtype, rows, classes, 2);
  std::vector<double> hard(rows), soft(rows), whole(rows);
  Matrix grad_student(dtype, rows, classes, 1);
  auto args = args_for<kdfast::KdLossArgs>(student, teacher, classes);
  args.tau = args.teacher_tau = tau;
  args.target = {targets, kdfast::NumberType::i64};
  args.row_loss = whole.data();
  args.row_hard = hard.data();
  args.row_soft = soft.data();
  args.grad_student = grad_student.gradient();
  kdfast::cpu::kd_loss_forward(args, 0, rows);
  bool numbers = false;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < classes; ++k) numbers = numbers || !std::isnan(grad_student.get(r, k));
  check_error(numbers ? 1 : 0, 0, "a gradient where the target is no class");
}

}  // namespace

int main() {
  skip_without_isa();
  using kdfast::Soft;
  const Form forms[] = {{Soft::kl, 1, 0.5, 0},    {Soft::kl, 4, 0.9, 0.1}, {Soft::kl, 0.5, 0.5, 0},
                        {Soft::mse, 1, 0.3, 0.1}, {Soft::kl, 2, 0, 0.1},   {Soft::mse, 1, 0, 0}};
  unsigned seed = 0;
  for (const DType s : kDTypes)
    for (const DType t : kDTypes) {
      if ((s == DType::f64) != (t == DType::f64)) continue;
      for (const int64_t classes : {1, 2, 7, 8, 9, 16, 17, 33, 100, 513, 70001})
        for (const Form& form : forms) {
          if (classes > 1000 && (s != t || form.soft != Soft::kl)) continue;
          ++seed;
          Matrix student = random_logits(s, 5, classes + seed % 4, seed),
                 teacher = random_logits(t, 5, classes + seed % 3, seed + 1);
          for (int64_t k = 0; k < student.width; ++k) student.set(1, k, kNan);  // a row of weight 0
          char name[120];
          std::snprintf(name, sizeof name, "%s-%s K=%ld soft=%d tau=%g alpha=%g", kDTypeNames[int(s)], kDTypeNames[int(t)],
                        long(classes), int(form.soft), form.tau, form.alpha);
          run(student, teacher, classes, form, name);
        }
    }
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const int64_t classes : {17, 100, 1003})
      for (const double tau : {1., 3., 4.}) run_no_class(dtype, classes, tau);
  return report();
}
