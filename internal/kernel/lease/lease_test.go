package lease

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/kernel/bootclock"
	"github.com/fathom-network/fathom/internal/testenv"
)

var pools = []ipam.Pool{{Name: "default", Ranges: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/28"), netip.MustParsePrefix("fd00::/64")}}}

func choose(fixed ...netip.Addr) func(ipam.State) (ipam.Choice, error) {
	return func(s ipam.State) (ipam.Choice, error) { return ipam.Choose(pools, ipam.Request{Addresses: fixed}, s) }
}

func open(t *testing.T, coolDown time.Duration, now func() bootclock.Instant) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "fathom"), coolDown)
	if err != nil {
		t.Fatal(err)
	}
	if now != nil {
		s.now = now
	}
	return s
}

func attachment(i int) Attachment { return Attachment{fmt.Sprintf("container%d", i), "eth0"} }

// TestProperties holds for the store and for its fake, whatever is done in whatever order.
func TestProperties(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	const (
		coolDown = 10 * time.Second
		most     = 13 // IPv4 addresses of the pool
	)
	for _, fake := range []bool{false, true} {
		now := time.UnixMilli(1_000_000)
		clock := func() time.Time { return now }
		var s Leases = &Fake{CoolDown: coolDown, Now: clock}
		if !fake {
			s = open(t, coolDown, func() bootclock.Instant { return bootclock.Instant{Boot: "this", At: now.Sub(time.UnixMilli(0))} })
		}
		rnd := rand.New(rand.NewPCG(seed, 0))
		held := map[Attachment]Lease{}
		released := map[netip.Addr]time.Time{}
		early := 0
		for step := range 3000 {
			a := attachment(rnd.IntN(20))
			switch rnd.IntN(5) {
			case 0, 1:
				l, err := s.Acquire(Lease{Attachment: a}, choose())
				var exists *ExistsError
				var exhausted *ipam.ExhaustedError
				_, has := held[a]
				switch {
				case has != errors.As(err, &exists):
					t.Fatalf("step %d: %s holds a lease: %v, and Acquire gives %v", step, a, has, err)
				case has:
					continue
				case errors.As(err, &exhausted):
					fresh := 0
					for _, at := range released {
						if now.Sub(at) < coolDown/leastRest {
							fresh++
						}
					}
					if fresh/2+len(held) < most { // each has two addresses
						t.Fatalf("step %d: %v with %d held and %d just released", step, err, len(held), fresh)
					}
					continue
				case err != nil:
					t.Fatal(err)
				}
				for _, addr := range l.Addresses {
					for _, other := range held {
						if slices.Contains(other.Addresses, addr) {
							t.Fatalf("step %d: %s is given to %s and to %s", step, addr, other.Attachment, a)
						}
					}
					at, found := released[addr]
					if !found || now.Sub(at) >= coolDown {
						continue
					}
					// Nothing else was free, and nothing has rested longer.
					cool := 0
					for other, since := range released {
						if other.Is4() == addr.Is4() && now.Sub(since) < coolDown {
							cool++
						}
						if other.Is4() == addr.Is4() && since.Before(at) {
							t.Fatalf("step %d: %s was released %s ago, %s %s ago", step, addr, now.Sub(at), other, now.Sub(since))
						}
					}
					if addr.Is6() || len(held)+cool < most || now.Sub(at) < coolDown/leastRest {
						t.Fatalf("step %d: %s was released %s ago, with %d held and %d cooling", step, addr, now.Sub(at), len(held), cool)
					}
					early++
				}
				for _, addr := range l.Addresses {
					delete(released, addr)
				}
				held[a] = l
			case 2, 3:
				if err := s.Release(a); err != nil {
					t.Fatal(err)
				}
				for _, addr := range held[a].Addresses {
					released[addr] = now
				}
				delete(held, a)
			case 4:
				now = now.Add(time.Duration(rnd.IntN(4000)) * time.Millisecond)
			}
			list, err := s.List()
			if err != nil || len(list) != len(held) {
				t.Fatalf("step %d: %d leases, %v; want %d", step, len(list), err, len(held))
			}
			if l, found, err := s.Find(a); err != nil || !slices.Equal(l.Addresses, held[a].Addresses) || found != (held[a].ContainerID != "") {
				t.Fatalf("step %d: %+v, %v, %v; want %+v", step, l, found, err, held[a])
			}
		}
		if early == 0 {
			t.Error("no address was given before it had rested")
		}
	}
}

// What was given to a pod while it cooled down is in use, for who looks at the store, too.
func TestGivenEarly(t *testing.T) {
	now := bootclock.Instant{Boot: "a", At: time.Hour}
	s := open(t, time.Minute, func() bootclock.Instant { return now })
	one := []ipam.Pool{{Name: "default", Ranges: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/30")}}}
	any := func(s ipam.State) (ipam.Choice, error) { return ipam.Choose(one, ipam.Request{}, s) }
	usage := func(inUse, cooling uint64) {
		t.Helper()
		u, err := s.Usage(one)
		testenv.Must(t, err)
		if u[0].InUse != inUse || u[0].Cooling != cooling {
			t.Errorf("%+v, want %d in use, %d cooling", u, inUse, cooling)
		}
	}
	for i := range 2 { // the second time, it has been released twice within the cool-down
		_, err := s.Acquire(Lease{Attachment: attachment(i)}, any)
		testenv.Must(t, err)
		usage(1, 0)
		testenv.Must(t, s.Release(attachment(i)))
		usage(0, 1)
		now.At += time.Minute/leastRest - time.Millisecond
		var exhausted *ipam.ExhaustedError
		if l, err := s.Acquire(Lease{Attachment: attachment(i + 1)}, any); !errors.As(err, &exhausted) {
			t.Errorf("it has hardly rested: %+v, %v", l, err)
		}
		now.At += time.Millisecond
	}
	fixed := one[0].Ranges[0].Addr().Next().Next()
	named := Lease{Attachment: attachment(5), PodNamespace: "default", PodName: "web-0", Addresses: []netip.Addr{fixed}}
	now.At += time.Hour
	for range 2 { // a pod that gets its address of before at once
		_, err := s.Acquire(named, func(s ipam.State) (ipam.Choice, error) {
			return ipam.Choose(one, ipam.Request{Addresses: named.Addresses}, s)
		})
		testenv.Must(t, err)
		usage(1, 0)
		testenv.Must(t, s.Release(named.Attachment))
	}
}

func TestTheSamePodReturns(t *testing.T) {
	s := open(t, time.Hour, nil)
	fixed := netip.MustParseAddr("10.1.0.9")
	web := Lease{Attachment: attachment(1), PodNamespace: "default", PodName: "web-0", Addresses: []netip.Addr{fixed}}
	for range 2 {
		if _, err := s.Acquire(web, choose(fixed)); err != nil {
			t.Fatal(err)
		}
		if err := s.Release(web.Attachment); err != nil {
			t.Fatal(err)
		}
	}
	other := web
	other.PodName = "db-0"
	if l, err := s.Acquire(other, choose(fixed)); err == nil {
		t.Errorf("another pod has it at once: %+v", l)
	}
}

// An address rests by the boot's clock, whatever the wall clock does. One that was released before the boot rests from then
// on; a time that the clock cannot have said counts as before the boot.
func TestCoolDown(t *testing.T) {
	const coolDown = 30 * time.Second
	fixed := netip.MustParseAddr("10.1.0.9")
	at := func(boot string, seconds int) bootclock.Instant {
		return bootclock.Instant{Boot: boot, At: time.Duration(seconds) * time.Second}
	}
	for name, test := range map[string]struct {
		released, asked bootclock.Instant
		free            bool
	}{
		"too early":                          {at("a", 100), at("a", 129), false},
		"rested":                             {at("a", 100), at("a", 130), true},
		"just after another boot":            {at("a", 100), at("b", 29), false},
		"a while after another boot":         {at("a", 100), at("b", 30), true},
		"another boot, at the same time":     {at("a", 100), at("b", 101), true},
		"a time that is yet to come":         {at("a", 5000), at("a", 29), false},
		"a time that is yet to come, rested": {at("a", 5000), at("a", 130), true},
	} {
		now := test.released
		s := open(t, coolDown, func() bootclock.Instant { return now })
		_, err := s.Acquire(Lease{Attachment: attachment(1)}, choose(fixed))
		testenv.Must(t, err)
		testenv.Must(t, s.Release(attachment(1)))
		now = test.asked
		if _, err := s.Acquire(Lease{Attachment: attachment(2)}, choose(fixed)); (err == nil) != test.free {
			t.Errorf("%s: %v", name, err)
		}
	}
	// As versions before this clock wrote it.
	for seconds, free := range map[int]bool{29: false, 30: true} {
		s := open(t, coolDown, func() bootclock.Instant { return at("a", seconds) })
		testenv.Must(t, os.WriteFile(filepath.Join(s.dir, coolingDir, fmt.Sprintf("%s@%d", fixed, time.Now().UnixMilli())), nil, 0o644))
		if _, err := s.Acquire(Lease{Attachment: attachment(1)}, choose(fixed)); (err == nil) != free {
			t.Errorf("%d s after the boot: %v", seconds, err)
		}
	}
}

func TestAge(t *testing.T) {
	now := bootclock.Instant{Boot: "a", At: time.Hour}
	s := open(t, time.Second, func() bootclock.Instant { return now })
	_, err := s.Acquire(Lease{Attachment: attachment(1)}, choose())
	testenv.Must(t, err)
	check := func(age time.Duration, ofThisBoot bool) {
		t.Helper()
		l, found, err := s.Find(attachment(1))
		if err != nil || !found || s.Age(l) != age || s.OfThisBoot(l) != ofThisBoot {
			t.Errorf("%v, %v, %v: is %s old, of this boot: %v; want %s, %v", l, found, err, s.Age(l), s.OfThisBoot(l), age, ofThisBoot)
		}
	}
	check(0, true)
	now.At += time.Minute
	check(time.Minute, true)
	now = bootclock.Instant{Boot: "b", At: time.Second}
	check(time.Second, false)
	if l := (Lease{Time: time.Now()}); s.OfThisBoot(l) { // of a version before this clock
		t.Errorf("%v is of this boot", l)
	}
}

// Whatever a power cut makes of the files, addresses are given, none twice, and Repair takes the damaged leases back.
func TestDamaged(t *testing.T) {
	boot := "before"
	s := open(t, time.Minute, func() bootclock.Instant { return bootclock.Instant{Boot: boot, At: time.Hour} })
	for class := range testenv.Damages(nil) {
		for i := range 2 {
			_, err := s.Acquire(Lease{Attachment: attachment(i)}, choose())
			testenv.Must(t, err)
		}
		_, err := s.SetPools([]ipam.Pool{{Name: "public", Ranges: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/28")}}})
		testenv.Must(t, err)
		for _, path := range []string{s.attachment(attachment(0)), s.path("last"), s.path(poolsFile)} {
			data, err := os.ReadFile(path)
			testenv.Must(t, err)
			testenv.Must(t, os.WriteFile(path, testenv.Damages(data)[class], 0o644)) // of a lease: under all its names
		}
		if l, found, err := s.Find(attachment(0)); err != nil || found {
			t.Errorf("%s: found %v, %v", class, l, err)
		}
		l, err := s.Acquire(Lease{Attachment: attachment(2)}, choose())
		if err != nil {
			t.Fatalf("%s: %v", class, err)
		}
		if other, _, _ := s.Find(attachment(1)); slices.ContainsFunc(l.Addresses, func(a netip.Addr) bool { return slices.Contains(other.Addresses, a) }) {
			t.Errorf("%s: %v and %v have the same", class, l, other)
		}
		damaged, err := s.Repair()
		if err != nil || len(damaged) != 1 || damaged[0] != "container0@eth0" {
			t.Errorf("%s: damaged are %v, %v", class, damaged, err)
		}
		state, err := s.State()
		if err != nil || len(state.InUse) != 4 || len(state.Cooling) != 2 || len(state.Pools) != 0 {
			t.Errorf("%s: %+v, %v", class, state, err)
		}
		for i := 1; i <= 2; i++ {
			testenv.Must(t, s.Release(attachment(i)))
		}
		boot += "," // all have rested
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"containerID":"c","ifname":"eth0","network":"fathom","netns":"/run/netns/x","hostDevice":"web","pool":"default","addresses":["10.1.0.9","fd00::9"],` +
		`"time":"2026-01-02T03:04:05Z","made":{"boot":"0a1b","at":123456789}}`))
	f.Add([]byte(`{"containerID":"../../x","ifname":"eth0"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := parse(data)
		if err != nil {
			if l.ContainerID != "" {
				t.Fatalf("both %v and %v", l, err)
			}
			return
		}
		s := &Store{dir: "/leases"}
		if dir := filepath.Dir(s.attachment(l.Attachment)); dir != "/leases/attachments" {
			t.Errorf("%q is in %s", l.Attachment, dir)
		}
		for _, a := range l.Addresses {
			if dir := filepath.Dir(s.address(a)); dir != "/leases/addresses" {
				t.Errorf("%q is in %s", a, dir)
			}
		}
	})
}

// What is made of names of files is what made them, or nothing.
func FuzzParseCooling(f *testing.F) {
	f.Add("10.1.0.9@123456@0a1b")
	f.Add("fd00::9@1700000000000")
	f.Add("10.1.0.9@-1@b")
	f.Fuzz(func(t *testing.T, name string) {
		a, released, ok := parseCooling(name)
		if !ok {
			return
		}
		if released.At < 0 || !a.IsValid() {
			t.Fatalf("%q is %v, released at %v", name, a, released)
		}
		if released.Boot != "" {
			if b, again, ok := parseCooling(coolingName(a, released)); !ok || a != b || again != released {
				t.Errorf("%q is %v, %v, and then %v, %v, %v", name, a, released, b, again, ok)
			}
		}
	})
}

func FuzzParsePools(f *testing.F) {
	f.Add([]byte(`[{"name":"public","ranges":["192.0.2.0/28"]}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		state := ipam.State{InUse: map[netip.Addr]bool{}, Cooling: map[netip.Addr]bool{}, Last: map[string]netip.Addr{}, Pools: parsePools(data)}
		for _, p := range state.Pools {
			_, _ = ipam.Choose(state.Pools, ipam.Request{Pool: p.Name}, state)
			for _, family := range inet.Families {
				_ = p.Usage(family, state)
			}
		}
	})
}

// TestInterrupted stops between any two steps: by hand, what a killed program would leave.
func TestInterrupted(t *testing.T) {
	s := open(t, 0, nil)
	l, err := s.Acquire(Lease{Attachment: attachment(1)}, choose())
	if err != nil {
		t.Fatal(err)
	}
	// Acquire was killed before its second address, which is another's by now.
	if err := os.Remove(s.address(l.Addresses[1])); err != nil {
		t.Fatal(err)
	}
	other, err := s.Acquire(Lease{Attachment: attachment(2)}, choose(l.Addresses[1]))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Release(l.Attachment); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.address(other.Addresses[1])); err != nil {
		t.Errorf("the address of another was released: %v", err)
	}
	// Release was killed before the attachment went.
	if err := s.cool(other.Addresses[0]); err != nil {
		t.Fatal(err)
	}
	if err := s.Release(other.Attachment); err != nil {
		t.Fatal(err)
	}
	// A power cut left empty files, and a person removed an attachment.
	damaged, err := s.Acquire(Lease{Attachment: attachment(3)}, choose())
	if err != nil {
		t.Fatal(err)
	}
	orphan, err := s.Acquire(Lease{Attachment: attachment(4)}, choose())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(s.attachment(damaged.Attachment), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(s.attachment(orphan.Attachment)); err != nil {
		t.Fatal(err)
	}
	if _, found, err := s.Find(damaged.Attachment); found || err != nil {
		t.Errorf("a damaged lease is found: %v", err)
	}
	if all, err := s.List(); err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}
	if _, err := s.Acquire(Lease{Attachment: damaged.Attachment}, choose()); err != nil {
		t.Errorf("the container of a damaged lease: %v", err)
	}
	if _, err := s.Repair(); err != nil {
		t.Fatal(err)
	}
	if err := s.ReleaseAddress(orphan.Addresses[0]); err != nil {
		t.Error(err)
	}
	if all, err := s.List(); err != nil || len(all) != 1 {
		t.Errorf("%v, %v", all, err)
	} else if err := s.ReleaseAddress(all[0].Addresses[1]); err != nil {
		t.Error(err)
	}
	for _, dir := range []string{addressesDir, attachmentsDir} {
		if names, _ := list(s.path(dir)); len(names) > 0 {
			t.Errorf("left in %s: %q", dir, names)
		}
	}
	if u, err := s.Usage(pools); err != nil || len(u) != 2 || u[0] != (ipam.Usage{Pool: "default", Family: inet.IPv4, Size: 13}) {
		t.Errorf("%+v, %v", u, err)
	}
}

func TestALongName(t *testing.T) {
	s := open(t, 0, nil)
	a := Attachment{strings.Repeat("x", 300), "eth0"}
	if _, err := s.Acquire(Lease{Attachment: a}, choose()); err != nil {
		t.Fatal(err)
	}
	if _, found, err := s.Find(a); !found || err != nil {
		t.Errorf("not found: %v", err)
	}
}

// TestProcesses kills processes that take and release at random: afterwards each address has one attachment at
// most, and when all are released none is left.
func TestProcesses(t *testing.T) {
	const child = "FATHOM_LEASE_CHILD"
	if spec := os.Getenv(child); spec != "" {
		dir, me, _ := strings.Cut(spec, "|")
		s, err := Open(dir, 0)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; ; i++ {
			a := Attachment{fmt.Sprintf("%s-%d", me, i%3), "eth0"}
			var exists *ExistsError // an earlier child of this number was killed
			if _, err := s.Acquire(Lease{Attachment: a}, choose()); err != nil && !ipam.IsTemporary(err) && !errors.As(err, &exists) {
				fmt.Println(err)
			}
			if err := s.Release(Attachment{fmt.Sprintf("%s-%d", me, (i+1)%3), "eth0"}); err != nil {
				fmt.Println(err)
			}
		}
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	s := open(t, 0, nil)
	for round := range 15 {
		var running []*exec.Cmd
		var out strings.Builder
		for i := range 3 {
			cmd := exec.Command(os.Args[0], "-test.run=^TestProcesses$")
			cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s|%d", child, s.dir, i))
			if i == 0 {
				cmd.Stdout = &out
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			running = append(running, cmd)
		}
		time.Sleep(time.Duration(5+rnd.IntN(60)) * time.Millisecond) // kill -9 at whatever they are doing
		for _, cmd := range running {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		if out.Len() > 0 {
			t.Fatalf("round %d: %s", round, out.String())
		}
		all, err := s.List()
		if err != nil {
			t.Fatal(err)
		}
		holder := map[netip.Addr]Attachment{}
		for _, l := range all {
			for _, a := range l.Addresses {
				if on, err := read(s.address(a)); err != nil || on.Attachment != l.Attachment {
					continue // killed before it had this one
				}
				if other, twice := holder[a]; twice {
					t.Fatalf("round %d: %s is of %s and of %s", round, a, other, l.Attachment)
				}
				holder[a] = l.Attachment
			}
		}
		names, err := list(s.path(addressesDir))
		if err != nil || len(names) != len(holder) {
			t.Fatalf("round %d: %d addresses in use, %d have an attachment, %v", round, len(names), len(holder), err)
		}
	}
	all, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range all {
		if err := s.Release(l.Attachment); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{addressesDir, attachmentsDir} {
		if names, _ := list(s.path(dir)); len(names) > 0 {
			t.Errorf("left in %s: %q", dir, names)
		}
	}
}

// TestSetPools: what is left out is given to nobody from then on, and a file that a power cut damaged is none.
func TestSetPools(t *testing.T) {
	s := open(t, time.Minute, nil)
	block := ipam.Pool{Name: "public", Ranges: []netip.Prefix{netip.MustParsePrefix("10.50.0.0/30")}, ExplicitOnly: true, Whole: true}
	get := func(i int) error {
		_, err := s.Acquire(Lease{Attachment: attachment(i)}, func(state ipam.State) (ipam.Choice, error) {
			return ipam.Choose(pools, ipam.Request{Pool: "public"}, state)
		})
		return err
	}
	if err := get(0); err == nil {
		t.Error("a pool that is not there")
	}
	state, err := s.SetPools([]ipam.Pool{block})
	if err != nil || len(state.InUse) != 0 || len(state.Pools) != 1 {
		t.Fatalf("%+v, %v", state, err)
	}
	for i := range 4 {
		if err := get(i); err != nil {
			t.Error(err)
		}
	}
	if err := get(4); !ipam.IsTemporary(err) {
		t.Error(err)
	}
	if err := s.Release(attachment(2)); err != nil {
		t.Fatal(err)
	}
	state, err = s.SetPools(nil)
	if err != nil || len(state.InUse) != 3 || len(state.Cooling) != 1 || len(state.Pools) != 0 {
		t.Errorf("%+v, %v", state, err)
	}
	if err := get(5); err == nil {
		t.Error("an address of what was left out")
	}
	if err := os.WriteFile(s.path(poolsFile), []byte(`[{"name":`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := get(6); err == nil {
		t.Error("an address of a damaged file")
	}
	if state, err = s.SetPools([]ipam.Pool{block}); err != nil || len(state.Pools) != 1 {
		t.Errorf("%+v, %v", state, err)
	}
}
