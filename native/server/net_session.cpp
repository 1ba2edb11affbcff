// net_session.cpp: a session's memory of what it has been answered; see net_session.h.
#include "net_session.h"

#include "../store/check.h"

namespace kvfs {

uint64_t AnswerMemory::what(const wire::Desc& d) {
  wire::Desc same = d;  // but for what differs between one way to the server and another
  same.addr = 0;
  same.sum = 0;
  same.rkey = 0;
  return wire::data_sum(&same, sizeof same);
}

AnswerMemory::Found AnswerMemory::find(uint64_t seq, uint64_t what, int64_t* result) const {
  if (mem_.empty()) return Found::New;
  const Slot& s = mem_[size_t(seq % slots_)];
  if (s.seq > seq) return Found::Forgotten;
  if (s.seq < seq) return s.running != nullptr ? Found::Busy : Found::New;
  if (s.undone) return Found::New;
  if (s.what != what) return Found::Different;
  if (s.running != nullptr) return Found::UnderWay;
  *result = s.result;
  return Found::Answered;
}

void AnswerMemory::begin(NetTask* t, uint64_t what) {
  if (mem_.empty()) mem_.resize(slots_);
  Slot& s = slot(t->op->desc.seq);
  KVFS_CHECK(s.running == nullptr);
  s = Slot{t->op->desc.seq, what, 0, false, t, nullptr};
  t->remembered = true;
}

void AnswerMemory::attach(NetTask* t) {
  Slot& s = slot(t->op->desc.seq);
  KVFS_CHECK(s.running != nullptr && s.seq == t->op->desc.seq);
  t->next = s.attached;
  s.attached = t;
}

NetTask* AnswerMemory::end(NetTask* t, int64_t result) {
  Slot& s = slot(t->op->desc.seq);
  KVFS_CHECK(s.running == t);
  t->remembered = false;
  NetTask* attached = s.attached;
  s.running = s.attached = nullptr;
  s.result = result;
  return attached;
}

NetTask* AnswerMemory::give_up(NetTask* t) {
  Slot& s = slot(t->op->desc.seq);
  KVFS_CHECK(s.running == t);
  t->remembered = false;
  NetTask* heir = s.attached;
  if (heir == nullptr) {
    s.running = nullptr;
    s.undone = true;
    return nullptr;
  }
  s.attached = heir->next;
  s.running = heir;
  heir->next = nullptr;
  heir->remembered = true;
  return heir;
}

}  // namespace kvfs
