#pragma once

#include <stdexcept>
#include <string>

namespace unetrt {

// What a caller got wrong; its text reaches the caller.
class Error : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

}  // namespace unetrt
