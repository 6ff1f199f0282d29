// A unit of the build: one traversal for one rule, named by KDK_RULE (a file of csrc/rules).
#pragma once

#define KDK_TEXT_(x) #x
#define KDK_TEXT(x) KDK_TEXT_(x)
#define KDK_JOIN_(a, b) a##b
#define KDK_JOIN(a, b) KDK_JOIN_(a, b)
#define KDK_HEADER(rule) KDK_TEXT(../rules/rule.h)

#include KDK_HEADER(KDK_RULE)

namespace kdkernels::cuda {
using Rule = rules::KDK_RULE::Rule;
}
