package kerneltypes

import (
	"encoding/binary"
	"os"
	"testing"

	"github.com/cilium/ebpf/btf"
)

func structOf(name string, size uint32, members ...btf.Member) *btf.Struct {
	return &btf.Struct{Name: name, Size: size, Members: members}
}

func bit(name string, offset uint32) btf.Member {
	return btf.Member{Name: name, Type: &btf.Int{Name: "unsigned int", Size: 4}, Offset: btf.Bits(offset), BitfieldSize: 1}
}

// raw has all kinds of types around the given ones.
func raw(t testing.TB, types ...btf.Type) []byte {
	t.Helper()
	long := &btf.Int{Name: "long", Size: 8}
	typedef := &btf.Typedef{Name: "number", Type: long}
	proto := &btf.FuncProto{Return: long, Params: []btf.FuncParam{{Name: "a", Type: long}, {Name: "b", Type: typedef}}}
	v := &btf.Var{Name: "variable", Type: long, Linkage: btf.GlobalVar}
	others := []btf.Type{
		long, typedef, proto, v, &btf.Pointer{Target: long}, &btf.Array{Index: long, Type: long, Nelems: 3},
		&btf.Union{Name: "either", Size: 8, Members: []btf.Member{{Name: "a", Type: long}, {Name: "b", Type: typedef}}},
		&btf.Enum{Name: "small", Size: 4, Values: []btf.EnumValue{{Name: "one", Value: 1}, {Name: "two", Value: 2}}},
		&btf.Enum{Name: "large", Size: 8, Values: []btf.EnumValue{{Name: "most", Value: 1 << 40}}},
		&btf.Fwd{Name: "later", Kind: btf.FwdStruct}, &btf.Volatile{Type: long}, &btf.Const{Type: long}, &btf.Restrict{Type: long},
		&btf.Func{Name: "function", Type: proto, Linkage: btf.GlobalFunc},
		&btf.Datasec{Name: ".data", Size: 8, Vars: []btf.VarSecinfo{{Type: v, Size: 8}}},
		&btf.Float{Name: "double", Size: 8}, &btf.TypeTag{Type: long, Value: "user"},
	}
	b, err := btf.NewBuilder(append(others, types...), nil)
	if err != nil {
		t.Fatal(err)
	}
	data, err := b.Marshal(nil, &btf.MarshalOptions{Order: binary.NativeEndian, PreventNoTypeFound: false})
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestFind(t *testing.T) {
	whole := btf.Member{Name: "flag", Type: &btf.Int{Name: "char", Size: 1}, Offset: 8}
	wide := bit("flag", 3)
	wide.BitfieldSize = 2
	inner := structOf("", 8, bit("flag", 4))
	for name, c := range map[string]struct {
		types        []btf.Type
		size, offset uint32
		wrong        string
	}{
		"the flag":          {types: []btf.Type{structOf("thing", 16, bit("other", 7), bit("flag", 77))}, size: 16, offset: 77},
		"twice, the same":   {types: []btf.Type{structOf("thing", 16, bit("flag", 9)), structOf("thing", 16, bit("flag", 9), bit("b", 10))}, size: 16, offset: 9},
		"a namesake":        {types: []btf.Type{structOf("thing", 4, bit("b", 0)), structOf("thing", 16, bit("flag", 9))}, size: 16, offset: 9},
		"twice, different":  {types: []btf.Type{structOf("thing", 16, bit("flag", 9)), structOf("thing", 16, bit("flag", 10))}, wrong: "several structs of that name have it, at different places"},
		"of another struct": {types: []btf.Type{structOf("thing", 8, bit("b", 3)), structOf("else", 8, bit("flag", 3))}, wrong: "no such struct has such a field of its own"},
		"nested":            {types: []btf.Type{structOf("thing", 8, btf.Member{Type: inner})}, wrong: "no such struct has such a field of its own"},
		"no such struct":    {types: []btf.Type{structOf("nothing", 8, bit("flag", 3))}, wrong: "there is no such name"},
		"no such field":     {types: []btf.Type{structOf("thing", 8, bit("flags", 3))}, wrong: "there is no such name"},
		"a whole byte":      {types: []btf.Type{structOf("thing", 8, whole)}, wrong: "the field is not one bit"},
		"two bits":          {types: []btf.Type{structOf("thing", 8, wide)}, wrong: "the field is not one bit"},
		"behind its end":    {types: []btf.Type{structOf("thing", 1, bit("flag", 8))}, wrong: errMalformed.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			size, offset, err := find(raw(t, c.types...), binary.NativeEndian, "thing", "flag")
			got := ""
			if err != nil {
				got = err.Error()
			}
			if size != c.size || offset != c.offset || got != c.wrong {
				t.Errorf("%d bytes, bit %d, %q; want %d, %d, %q", size, offset, got, c.size, c.offset, c.wrong)
			}
		})
	}
}

// TestCut has BTF end anywhere.
func TestCut(t *testing.T) {
	whole := raw(t, structOf("thing", 16, bit("flag", 77)))
	for n := range whole {
		if _, _, err := find(whole[:n], binary.NativeEndian, "thing", "flag"); err == nil {
			t.Errorf("the first %d bytes of %d are no error", n, len(whole))
		}
	}
}

// TestKernel compares with what the loader finds in the running kernel.
func TestKernel(t *testing.T) {
	if _, err := os.Stat(vmlinux); err != nil {
		t.Skip("this kernel does not show its types")
	}
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	compared := 0
	for _, name := range []string{"sock", "sk_buff", "tcp_sock", "net_device"} {
		var want, got *btf.Struct
		if err := kernel.TypeByName(name, &want); err != nil {
			t.Fatal(err)
		}
		for _, m := range want.Members {
			if m.BitfieldSize != 1 {
				continue
			}
			small, err := Flag(name, m.Name)
			if err != nil {
				t.Errorf("%s.%s: %v", name, m.Name, err)
				continue
			}
			if err := small.TypeByName(name, &got); err != nil {
				t.Fatal(err)
			}
			if len(got.Members) != 1 || got.Size != want.Size || got.Members[0].Offset != m.Offset || got.Members[0].BitfieldSize != 1 {
				t.Errorf("%s.%s is %v of %d bytes, want bit %d of %d bytes", name, m.Name, got.Members, got.Size, m.Offset, want.Size)
			}
			compared++
		}
	}
	if compared == 0 {
		t.Error("these structs of the kernel have no flags")
	}
}

func FuzzFind(f *testing.F) {
	f.Add(raw(f, structOf("thing", 16, bit("flag", 77))))
	f.Fuzz(func(t *testing.T, data []byte) {
		size, offset, err := find(data, binary.NativeEndian, "thing", "flag")
		if err == nil && offset/8 >= size {
			t.Errorf("bit %d of a struct of %d bytes", offset, size)
		}
	})
}

func BenchmarkFlag(b *testing.B) {
	for b.Loop() {
		if _, err := Flag("sock", "sk_kern_sock"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLoader(b *testing.B) {
	for b.Loop() {
		kernel, err := btf.LoadKernelSpec()
		if err != nil {
			b.Fatal(err)
		}
		var s *btf.Struct
		if err := kernel.TypeByName("sock", &s); err != nil {
			b.Fatal(err)
		}
	}
}
