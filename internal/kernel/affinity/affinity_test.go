package affinity

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestPick(t *testing.T) {
	var set unix.CPUSet
	for _, cpu := range []int{1, 4, 63, 64} {
		set.Set(cpu)
	}
	for nth, want := range map[int]int{0: 1, 1: 4, 2: 63, 3: 64, 4: 1, 7: 64} {
		if is := pick(&set, nth); is != want {
			t.Errorf("processor %d of 1, 4, 63, 64 is %d, want %d", nth, is, want)
		}
	}
}

func TestBind(t *testing.T) {
	var before, bound, after unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		t.Fatal(err)
	}
	release, err := Bind(1)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SchedGetaffinity(0, &bound); err != nil {
		t.Fatal(err)
	}
	release()
	if err := unix.SchedGetaffinity(0, &after); err != nil {
		t.Fatal(err)
	}
	if bound.Count() != 1 || !before.IsSet(pick(&bound, 0)) {
		t.Errorf("bound to %d processors", bound.Count())
	}
	if after != before {
		t.Error("a released thread is bound still")
	}
}
