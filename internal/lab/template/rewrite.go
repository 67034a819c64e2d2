package template

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"reflect"
	"regexp"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// rewriter changes the texts and times of objects, wherever in them these stand.
type rewriter struct {
	text func(string) string
	time func(time.Time) time.Time
}

var (
	timeType      = reflect.TypeFor[metav1.Time]()
	microTimeType = reflect.TypeFor[metav1.MicroTime]()
	quantityType  = reflect.TypeFor[resource.Quantity]()
	fieldsType    = reflect.TypeFor[metav1.FieldsV1]()
)

// value rewrites what can be set in v: an object's fields and all that they lead to. Keys of maps are names, and stay.
func (r rewriter) value(v reflect.Value) {
	switch v.Type() {
	case timeType:
		if t := v.Addr().Interface().(*metav1.Time); !t.IsZero() {
			t.Time = r.time(t.Time)
		}
		return
	case microTimeType:
		if t := v.Addr().Interface().(*metav1.MicroTime); !t.IsZero() {
			t.Time = r.time(t.Time)
		}
		return
	case fieldsType:
		f := v.Addr().Interface().(*metav1.FieldsV1)
		f.SetRawString(r.text(f.GetRawString()))
		return
	case quantityType:
		return
	}
	switch v.Kind() {
	case reflect.String:
		if s := v.String(); s != "" {
			v.SetString(r.text(s))
		}
	case reflect.Pointer, reflect.Interface:
		if !v.IsNil() {
			r.value(v.Elem())
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if f := v.Field(i); f.CanSet() {
				r.value(f)
			}
		}
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			if v.Len() > 0 {
				v.SetBytes([]byte(r.text(string(v.Bytes()))))
			}
			return
		}
		for i := range v.Len() {
			r.value(v.Index(i))
		}
	case reflect.Map:
		for _, key := range v.MapKeys() {
			e := reflect.New(v.Type().Elem()).Elem()
			e.Set(v.MapIndex(key))
			r.value(e)
			v.SetMapIndex(key, e)
		}
	}
}

// json rewrites an object that is stored as JSON.
func (r rewriter) json(data []byte) ([]byte, error) {
	var object any
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&object); err != nil {
		return nil, err
	}
	return json.Marshal(r.decoded(object))
}

func (r rewriter) decoded(v any) any {
	switch v := v.(type) {
	case string:
		if t, err := time.Parse(time.RFC3339, v); err == nil {
			return r.time(t).UTC().Format(time.RFC3339)
		}
		return r.text(v)
	case []any:
		for i := range v {
			v[i] = r.decoded(v[i])
		}
	case map[string]any:
		for k := range v {
			v[k] = r.decoded(v[k])
		}
	}
	return v
}

// addressLike is what may be an IP address, with what stands around one in a URL or a list left out as far as can be.
var addressLike = regexp.MustCompile(`[0-9a-fA-F]*[.:][0-9a-fA-F.:]*(?:[0-9a-fA-F]|::)`)

// moveAddresses returns the text with each address of one of the ranges from moved to the same place in the range of to. The
// ranges of a pair are equally large.
func moveAddresses(s string, from, to []netip.Prefix) string {
	if !strings.ContainsAny(s, ".:") {
		return s
	}
	return addressLike.ReplaceAllStringFunc(s, func(token string) string {
		if a, err := netip.ParseAddr(token); err == nil {
			if moved, ok := move(a, from, to); ok {
				return moved.String()
			}
			return token
		}
		if p, err := netip.ParseAddrPort(token); err == nil {
			if moved, ok := move(p.Addr(), from, to); ok {
				return netip.AddrPortFrom(moved, p.Port()).String()
			}
		}
		return token
	})
}

func move(a netip.Addr, from, to []netip.Prefix) (netip.Addr, bool) {
	for i, p := range from {
		if !p.IsValid() || !p.Contains(a) || !to[i].IsValid() || to[i].Bits() != p.Bits() {
			continue
		}
		bytes, network := a.AsSlice(), to[i].Masked().Addr().AsSlice()
		for bit := range p.Bits() {
			mask := byte(0x80) >> (bit % 8)
			bytes[bit/8] = bytes[bit/8]&^mask | network[bit/8]&mask
		}
		moved, _ := netip.AddrFromSlice(bytes)
		return moved, true
	}
	return netip.Addr{}, false
}

var uidLike = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)

// replaceUIDs returns the text with each of the UIDs replaced by its new one.
func replaceUIDs(s string, uids map[string]string) string {
	if len(s) < 36 {
		return s
	}
	return uidLike.ReplaceAllStringFunc(s, func(uid string) string {
		if next, ok := uids[uid]; ok {
			return next
		}
		return uid
	})
}
