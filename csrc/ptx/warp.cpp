// Exchange within a warp: shfl.sync, vote.sync, match.sync, redux.sync, activemask. The lanes of a member mask wait for
// each other at the instruction, but not for lanes that have exited.
#include <algorithm>

#include "decode.h"
#include "machine.h"

namespace gpt2fast::ptx {
namespace {

// The result of a shuffle where PTX leaves it undefined. It is a NaN in every float format.
constexpr uint32_t kUndefined = 0xffffffffu;

// Runs an instruction for the lanes that give the same member mask. Lanes with another mask are another team, which
// runs on its own: cooperative groups give each tile of a warp its own mask. Operand number mode[1] is the mask.
template <Handler kBody>
void by_teams(Warp& w, const Instruction& i, uint32_t mask) {
  const auto* given = w.lanes<uint32_t>(i.operand[i.mode[1]]);
  auto team_of = [&](uint32_t lanes) {
    uint32_t members = given[__builtin_ctz(lanes)];
    return lanes & ballot([=](int l) { return given[l] == members; });
  };
  uint32_t first = team_of(mask), members = given[__builtin_ctz(mask)];
  if (first == mask) {
    if (w.gather(members, mask)) kBody(w, i, mask);
    return;
  }
  bool complete = true;
  for (uint32_t rest = mask, team; rest; rest &= ~team) {
    team = team_of(rest);
    complete = complete && (given[__builtin_ctz(team)] & w.live()) == team;
  }
  if (!complete) {  // the teams continue one after the other
    w.split_team(mask & ~first);
    if (w.gather(members, first)) kBody(w, i, first);
    return;
  }
  for (uint32_t rest = mask, team; rest; rest &= ~team) kBody(w, i, team = team_of(rest));
}

enum ShuffleMode : uint8_t { kUp, kDown, kButterfly, kIndex };

// operand: d [p] a b c members
template <ShuffleMode kMode>
void shuffle(Warp& w, const Instruction& i, uint32_t mask) {
  const uint32_t* o = i.operand + 1 + i.mode[0];
  const auto *a = w.lanes<uint32_t>(o[0]), *b = w.lanes<uint32_t>(o[1]), *c = w.lanes<uint32_t>(o[2]);
  uint32_t result[kLanes], in_range = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    int delta = int(b[lane] & 31), clamp = int(c[lane] & 31), segment = int(c[lane] >> 8 & 31);
    int least = lane & segment, most = least | (clamp & ~segment), from;
    if (kMode == kUp)
      from = lane - delta;
    else if (kMode == kDown)
      from = lane + delta;
    else if (kMode == kButterfly)
      from = lane ^ delta;
    else
      from = least | (delta & ~segment);
    bool inside = kMode == kUp ? from >= most : from <= most;
    if (!inside) from = lane;
    in_range |= uint32_t(inside) << lane;
    result[lane] = mask >> from & 1 ? a[from] : kUndefined;
  }
  each(mask, w.lanes<uint32_t>(i.operand[0]), [&](int l) { return result[l]; });
  if (i.mode[0]) set_predicate(w.predicate(i.operand[1]), mask, in_range);
}

// A destination and, after '|', a predicate.
void write_pair(Decoder& d) {
  Operand o = d.operand();
  d.write_operand(o, Type::B32, true);
  if (o.pair.empty()) return;
  Operand predicate;
  predicate.what = Operand::Name;
  predicate.name = o.pair;
  d.write_operand(predicate, Type::Pred, true);
  d.ins.mode[0] = 1;
}

void expect_sync(Decoder& d) {
  d.ins.sync = true;
  if (!d.take("sync")) d.fail("the form without .sync does not exist from sm_70 on");
}

void decode_shuffle(Decoder& d) {
  expect_sync(d);
  int mode = d.choose({"up", "down", "bfly", "idx"});
  if (mode < 0) d.fail("expected .up, .down, .bfly or .idx");
  d.type({Type::B32});
  write_pair(d);
  for (int k = 0; k < 4; ++k) d.read(Type::B32);
  d.ins.mode[1] = uint8_t(4 + d.ins.mode[0]);
  constexpr Handler kHandlers[] = {by_teams<shuffle<kUp>>, by_teams<shuffle<kDown>>, by_teams<shuffle<kButterfly>>,
                                   by_teams<shuffle<kIndex>>};
  d.ins.run = kHandlers[mode];
}

enum Vote : uint8_t { kAll, kAny, kUni, kBallot };

// operand: d p members; mode[0]: the predicate is negated
template <Vote kVote>
void vote(Warp& w, const Instruction& i, uint32_t mask) {
  uint32_t p = w.predicate(i.operand[1]), yes = (i.mode[0] ? ~p : p) & mask;
  if (kVote == kBallot) {
    each(mask, w.lanes<uint32_t>(i.operand[0]), [=](int) { return yes; });
    return;
  }
  bool result = kVote == kAll ? yes == mask : kVote == kAny ? yes != 0 : yes == mask || yes == 0;
  set_predicate(w.predicate(i.operand[0]), mask, result ? kAllLanes : 0);
}

void decode_vote(Decoder& d) {
  expect_sync(d);
  int kind = d.choose({"all", "any", "uni", "ballot"});
  if (kind < 0) d.fail("expected .all, .any, .uni or .ballot");
  if (kind == kBallot)
    d.type({Type::B32}), d.write(Type::B32);
  else
    d.type({Type::Pred}), d.write_predicate();
  d.ins.mode[0] = d.read_predicate();
  d.read(Type::B32);
  d.ins.mode[1] = 2;
  constexpr Handler kHandlers[] = {by_teams<vote<kAll>>, by_teams<vote<kAny>>, by_teams<vote<kUni>>,
                                   by_teams<vote<kBallot>>};
  d.ins.run = kHandlers[kind];
}

void active_mask(Warp& w, const Instruction& i, uint32_t mask) {
  each(mask, w.lanes<uint32_t>(i.operand[0]), [=](int) { return mask; });
}

// operand: d a members
template <class T>
void match_any(Warp& w, const Instruction& i, uint32_t mask) {
  const T* a = w.lanes<T>(i.operand[1]);
  uint32_t result[kLanes];
  for_lanes(mask, [&](int l) { result[l] = mask & ballot([=](int k) { return a[k] == a[l]; }); });
  each(mask, w.lanes<uint32_t>(i.operand[0]), [&](int l) { return result[l]; });
}

// operand: d [p] a members
template <class T>
void match_all(Warp& w, const Instruction& i, uint32_t mask) {
  const uint32_t* o = i.operand + 1 + i.mode[0];
  const T* a = w.lanes<T>(o[0]);
  T first = a[__builtin_ctz(mask)];
  bool same = (ballot([=](int l) { return a[l] == first; }) & mask) == mask;
  each(mask, w.lanes<uint32_t>(i.operand[0]), [=](int) { return same ? mask : 0u; });
  if (i.mode[0]) set_predicate(w.predicate(i.operand[1]), mask, same ? kAllLanes : 0);
}

void decode_match(Decoder& d) {
  int kind = d.choose({"any", "all"});
  if (kind < 0) d.fail("expected .any or .all");
  expect_sync(d);
  Type t = d.type({Type::B32, Type::B64});
  if (kind == 1)
    write_pair(d);
  else
    d.write(Type::B32);
  d.read(t);
  d.read(Type::B32);
  bool wide = t == Type::B64;
  d.ins.mode[1] = uint8_t(2 + d.ins.mode[0]);
  d.ins.run = kind == 0 ? (wide ? by_teams<match_any<uint64_t>> : by_teams<match_any<uint32_t>>)
                        : (wide ? by_teams<match_all<uint64_t>> : by_teams<match_all<uint32_t>>);
}

enum Reduction : uint8_t { kAdd, kMin, kMax, kAnd, kOr, kXor };

// operand: d a members
template <class T, Reduction kOp>
void reduce(Warp& w, const Instruction& i, uint32_t mask) {
  const T* a = w.lanes<T>(i.operand[1]);
  T result = a[__builtin_ctz(mask)];
  for_lanes(mask & (mask - 1), [&](int l) {
    T x = a[l];
    result = kOp == kAdd   ? T(uint32_t(result) + uint32_t(x))
             : kOp == kMin ? std::min(result, x)
             : kOp == kMax ? std::max(result, x)
             : kOp == kAnd ? T(result & x)
             : kOp == kOr  ? T(result | x)
                           : T(result ^ x);
  });
  each(mask, w.lanes<T>(i.operand[0]), [=](int) { return result; });
}

void decode_reduce(Decoder& d) {
  expect_sync(d);
  int op = d.choose({"add", "min", "max", "and", "or", "xor"});
  if (op < 0) d.fail("expected .add, .min, .max, .and, .or or .xor");
  Type t = op >= kAnd ? d.type({Type::B32}) : d.type({Type::U32, Type::S32});
  d.write(Type::B32);
  d.read(Type::B32);
  d.read(Type::B32);
  d.ins.mode[1] = 2;
  constexpr Handler kUnsigned[] = {by_teams<reduce<uint32_t, kAdd>>, by_teams<reduce<uint32_t, kMin>>,
                                   by_teams<reduce<uint32_t, kMax>>, by_teams<reduce<uint32_t, kAnd>>,
                                   by_teams<reduce<uint32_t, kOr>>,  by_teams<reduce<uint32_t, kXor>>};
  constexpr Handler kSigned[] = {by_teams<reduce<int32_t, kAdd>>, by_teams<reduce<int32_t, kMin>>,
                                 by_teams<reduce<int32_t, kMax>>};
  d.ins.run = t == Type::S32 ? kSigned[op] : kUnsigned[op];
}

}  // namespace

void add_warp(Opcodes& table) {
  table["shfl"] = decode_shuffle;
  table["vote"] = decode_vote;
  table["match"] = decode_match;
  table["redux"] = decode_reduce;
  table["activemask"] = [](Decoder& d) {
    d.type({Type::B32});
    d.write(Type::B32);
    d.ins.run = active_mask;
  };
}

}  // namespace gpt2fast::ptx
