// Where a thread finds its part of a row, and where its part of the gradient goes.
//
// find_maxima(origin): extends the maxima of student and teacher by this thread's classes.
// find_first(origin): likewise by its first classes only (long rows, kLong).
// each(f): calls f(student, teacher) for every class of this thread.
// emit(f): likewise, and writes what f returns as the gradient, where one is wanted.
// clear(): writes zeros as the gradient, for a row that is not valid. Such a row is never loaded.
// exclude(target): the target's logits count as -inf from here on (on-chip copies are overwritten).
// put(target, g): the thread that owns the target writes its gradient.
//
// A class past the end of the row reads as -inf on both sides, which no sum notices.
#pragma once

#include "resident.cuh"
#include "streamed.cuh"
