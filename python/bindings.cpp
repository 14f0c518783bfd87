// The module bitkern._C: for each operator a function that takes what its C++ launcher takes, and
// calls it with the GIL released. A struct is a dict of its fields, a pointer an address.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "bitkern/cpu.h"
#include "bitkern/operators.h"

namespace py = pybind11;
using namespace bitkern;

namespace {

void convert(PyObject* from, bool& to) { to = PyObject_IsTrue(from); }
void convert(PyObject* from, int64_t& to) { to = PyLong_AsLongLong(from); }
void convert(PyObject* from, float& to) { to = float(PyFloat_AsDouble(from)); }
void convert(PyObject* from, DType& to) { to = DType(PyLong_AsLong(from)); }
void convert(PyObject* from, Activation& to) { to = Activation(PyLong_AsLong(from)); }
template <class T>
void convert(PyObject* from, T*& to) {
  to = static_cast<T*>(PyLong_AsVoidPtr(from));
}

[[noreturn]] void refuse(const char* op, const std::string& why) {
  throw py::type_error(std::string(op) + ": " + why);
}

std::string quoted(py::handle object) { return py::repr(object); }
std::string type_of(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

// "one, two" as Python strings, interned: a dict finds these without comparing characters.
std::vector<py::handle> interned(const std::string& names) {
  std::vector<py::handle> strings;
  for (size_t begin = 0, end; begin < names.size(); begin = end + 2) {
    end = std::min(names.find(',', begin), names.size());
    strings.push_back(PyUnicode_InternFromString(names.substr(begin, end - begin).c_str()));
  }
  return strings;
}

// A struct from the dict of its fields, no more and no fewer.
template <class Struct>
Struct decode(py::handle from, const char* op) {
  if (!PyDict_Check(from.ptr())) refuse(op, "expected a dict, got " + type_of(from));
  Struct to{};
  to.visit([&](const char* list, auto&... fields) {
    static const std::vector<py::handle> names = interned(list);
    auto name = names.begin();
    const auto fill = [&](auto& field) {
      PyObject* const value = PyDict_GetItemWithError(from.ptr(), name->ptr());
      if (!value) refuse(op, "missing argument " + quoted(*name));
      convert(value, field);
      if (PyErr_Occurred()) {
        PyErr_Clear();
        refuse(op, "argument " + quoted(*name) + " cannot be " + quoted(value));
      }
      ++name;
    };
    (fill(fields), ...);
    if (size_t(PyDict_GET_SIZE(from.ptr())) == names.size()) return;
    for (const auto& item : py::reinterpret_borrow<py::dict>(from)) {
      bool known = false;
      for (const py::handle each : names) known = known || item.first.equal(each);
      if (!known) refuse(op, "unexpected argument " + quoted(item.first));
    }
  });
  return to;
}

// An argument of a launcher, decoded and kept while it runs.
template <class T>
struct Argument {
  T value;
  Argument(py::handle from, const char* op) : value(decode<T>(from, op)) {}
};

template <class T>
struct Argument<Span<T>> {
  std::vector<T> items;
  Span<T> value;
  Argument(py::handle from, const char* op) {
    if (!PyList_Check(from.ptr())) refuse(op, "expected a list of dicts, got " + type_of(from));
    items.reserve(PyList_GET_SIZE(from.ptr()));
    for (const py::handle item : py::reinterpret_borrow<py::list>(from)) {
      items.push_back(decode<T>(item, op));
    }
    value = {items.data(), int64_t(items.size())};
  }
};

// `how` is the last argument of a launcher: the number of threads, or the address of the stream.
template <class Problem, class Tensors, class How>
void def(py::module_& m, const char* name, void (*launch)(const Problem&, const Tensors&, How)) {
  using Number = std::conditional_t<std::is_pointer_v<How>, std::uintptr_t, How>;
  m.def(name, [=](py::handle problem, py::handle tensors, Number how) {
    const Argument<Problem> what(problem, name);
    const Argument<Tensors> on(tensors, name);
    py::gil_scoped_release release;
    launch(what.value, on.value, (How)how);
  });
}

void def_cpu(py::module_ m) {
  m.def("isa", &cpu::isa);
#define DEF(name, Problem, Tensors) def(m, #name, &cpu::name);
  BITKERN_CPU_OPERATORS(DEF)
#undef DEF
}

#ifdef BITKERN_WITH_CUDA
void def_cuda(py::module_ m) {
#define DEF(name, Problem, Tensors) def(m, #name, &cuda::name);
  BITKERN_CUDA_OPERATORS(DEF)
#undef DEF
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  def_cpu(m.def_submodule("cpu"));
  m.attr("compiler") = __VERSION__;
#ifdef BITKERN_WITH_CUDA
  def_cuda(m.def_submodule("cuda"));
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
