// What a capability says and who believes it.
#include "wire/capability.h"

#include <gtest/gtest.h>
#include <sodium.h>

#include <cerrno>

#include "net_capability.h"

namespace kvfs::wire {
namespace {

using testing_net::Issuer;

TEST(Capability, WhatWasSignedIsRead) {
  Issuer who;
  const auto bytes = who.make({{7, kBlocks, kRead | kWrite, kCache, 0}, {9, kFiles, kAllRights, 0, 0}}, 100, 200);
  Capability c;
  ASSERT_EQ(open_capability(bytes.data(), bytes.size(), who.key, &c), 0);
  EXPECT_EQ(c.rights(Kind::Block, 7), kRead | kWrite);
  EXPECT_EQ(c.rights(Kind::File, 7), 0);
  EXPECT_EQ(c.rights(Kind::File, 9), kAllRights);
  EXPECT_EQ(c.rights(Kind::Block, 8), 0);
  EXPECT_EQ(c.rights(Kind::Block, kAnyNamespace), 0) << "all namespaces at once need a grant of all";
  EXPECT_TRUE(c.cache(Kind::Block, 7));
  EXPECT_FALSE(c.cache(Kind::File, 9));
  EXPECT_STREQ(c.tenant, "tenant");
  EXPECT_FALSE(c.valid_at(99));
  EXPECT_TRUE(c.valid_at(100));
  EXPECT_TRUE(c.valid_at(199));
  EXPECT_FALSE(c.valid_at(200));
}

TEST(Capability, GrantsAddUpAndOneOfAllNamespacesCountsEverywhere) {
  Issuer who;
  const auto bytes = who.make({{kAnyNamespace, kBlocks, kRead, 0, 0}, {7, kBlocks, kDelete, 0, 0}});
  Capability c;
  ASSERT_EQ(open_capability(bytes.data(), bytes.size(), who.key, &c), 0);
  EXPECT_EQ(c.rights(Kind::Block, 7), kRead | kDelete);
  EXPECT_EQ(c.rights(Kind::Block, 8), kRead);
  EXPECT_EQ(c.rights(Kind::Block, kAnyNamespace), kRead);
}

TEST(Capability, AnyFlippedBitMakesItWorthless) {
  Issuer who;
  const auto good = who.make({{7, kBlocks, kRead, 0, 0}});
  for (size_t i = 0; i < good.size() * 8; ++i) {
    auto bad = good;
    bad[i / 8] ^= uint8_t(1u << (i % 8));
    Capability c;
    EXPECT_NE(open_capability(bad.data(), bad.size(), who.key, &c), 0) << "bit " << i;
    EXPECT_TRUE(c.grants.empty());
  }
}

TEST(Capability, NoShorterAndNoLongerOneIsTaken) {
  Issuer who;
  auto bytes = who.make({{7, kBlocks, kRead, 0, 0}});
  Capability c;
  for (size_t n = 0; n < bytes.size(); ++n) EXPECT_LT(open_capability(bytes.data(), n, who.key, &c), 0) << n;
  bytes.push_back(0);
  EXPECT_LT(open_capability(bytes.data(), bytes.size(), who.key, &c), 0);
  const std::vector<uint8_t> huge(kMaxCapability + 1);
  EXPECT_EQ(open_capability(huge.data(), huge.size(), who.key, &c), -EPROTO);
}

TEST(Capability, AnotherKeysSignatureIsNone) {
  Issuer one, two;
  const auto bytes = one.make({{7, kBlocks, kRead, 0, 0}});
  Capability c;
  EXPECT_EQ(open_capability(bytes.data(), bytes.size(), two.key, &c), -EACCES);
}

TEST(Capability, WhatMakesNoSenseIsRefusedThoughSigned) {
  Issuer who;
  Capability c;
  const auto refused = [&](const std::vector<uint8_t>& b, int err = -EPROTO) {
    EXPECT_EQ(open_capability(b.data(), b.size(), who.key, &c), err);
  };
  refused(who.make({}));
  refused(who.make({{0, kBlocks, kRead, 0, 0}}));
  refused(who.make({{7, 0, kRead, 0, 0}}));
  refused(who.make({{7, 4, kRead, 0, 0}}));
  refused(who.make({{7, kBlocks, 0, 0, 0}}));
  refused(who.make({{7, kBlocks, 16, 0, 0}}));
  refused(who.make({{7, kBlocks, kRead, 2, 0}}));
  refused(who.make({{7, kBlocks, kRead, 0, 1}}));
  refused(who.make({{7, kBlocks, kRead, 0, 0}}, 200, 200));
  refused(who.make({{7, kBlocks, kRead, 0, 0}}, 0, 100, ""));
  refused(who.make({{7, kBlocks, kRead, 0, 0}}, 0, 100, "a/b"));
  refused(who.make(std::vector<Grant>(kMaxGrants + 1, Grant{7, kBlocks, kRead, 0, 0})));
  refused(who.make({{7, kBlocks, kRead, 0, 0}}, 0, 100, "t", 2), -EPROTONOSUPPORT);
  const auto most = who.make(std::vector<Grant>(kMaxGrants, Grant{7, kBlocks, kRead, 0, 0}));
  EXPECT_EQ(open_capability(most.data(), most.size(), who.key, &c), 0);
}

TEST(Capability, EachOperationNeedsItsRightToItsKindAndNamespace) {
  struct Case {
    Op op;
    uint8_t right;
  };
  const Case cases[] = {{Op::Get, kRead},    {Op::Lookup, kRead},    {Op::Put, kWrite},     {Op::Write, kWrite},
                        {Op::Flush, kWrite}, {Op::Truncate, kWrite}, {Op::Delete, kDelete}, {Op::Purge, kDelete},
                        {Op::Scan, kList},   {Op::Sync, kWrite}};
  for (const Case& k : cases) {
    for (uint8_t rights = 1; rights <= kAllRights; ++rights) {
      for (const uint8_t kind : {uint8_t(Kind::Block), uint8_t(Kind::File)}) {
        Capability c;
        c.grants = {{7, kind == uint8_t(Kind::Block) ? kBlocks : kFiles, rights, 0, 0}};
        Desc d{};
        d.op = uint8_t(k.op);
        d.kind = kind;
        d.ns = 7;
        const bool may = (rights & k.right) != 0;
        EXPECT_EQ(check_rights(c, d), may ? 0 : -EACCES) << int(d.op) << " with " << int(rights);
        if (k.op == Op::Sync) continue;  // of the whole target
        d.ns = 8;
        EXPECT_EQ(check_rights(c, d), -EACCES);
        d.ns = 7;
        d.kind = 3 - kind;
        EXPECT_EQ(check_rights(c, d), -EACCES);
        d.kind = kind;
        d.ns = kAnyNamespace;
        EXPECT_EQ(check_rights(c, d), k.op == Op::Scan ? -EACCES : -EINVAL);
      }
    }
  }
  Capability none;
  Desc stat{};
  stat.op = uint8_t(Op::Stat);
  EXPECT_EQ(check_rights(none, stat), 0);
}

}  // namespace
}  // namespace kvfs::wire
